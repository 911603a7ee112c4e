// AVX-512 (F, BW, DQ, VL): 16 accumulators of 16 fp32 numbers, 8 x 32 tiles. For the processors
// that have no more than that: 32 KiB of L1, four instructions a cycle, of which two have to
// multiply. Measured on Cascade Lake, in one and two threads, beside stretches of 192 without
// unrolling: 1.05 to 1.25 times as fast at 64 to 1024; tiles of 8 x 48 were no faster, and slower
// below 256.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"
#include "target.h"

SK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c" SK_WIDEST_VECTORS)
namespace spectral_kernels::cpu::avx512 {
#define SK_NAME "avx512"
#define SK_VECTOR_BYTES 64
#define SK_MR 8
#define SK_NV 2
#define SK_PV 2
#define SK_BLOCK_K 128
#define SK_UNROLL_K 2
#define SK_READ_ALONG 2
#define SK_HAS_F16C 1
#define SK_HAS_BF16_DOT 0
#include "table.inl"
}  // namespace spectral_kernels::cpu::avx512
SK_TARGET_END
#endif
