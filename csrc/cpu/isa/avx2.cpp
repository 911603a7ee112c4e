// AVX2 with FMA and F16C: 12 accumulators of 8 fp32 numbers, 4 x 24 tiles. Measured on Zen 3, one
// thread, beside stretches of 192, a row a turn, the compiler's order and nothing fetched
// ahead: 1.05 to 1.09 times as fast at 64 to 192, 1.07 to 1.12 at 768 and 1024, 1.11 to 1.14 at 768
// x 3072. With four rows a turn, whose offsets take four bytes, it lost up to a tenth; with
// stretches of 96 or 192 a fiftieth; a vector read from memory by the multiplications saved
// nothing.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"
#include "target.h"

SK_TARGET_BEGIN("avx2,fma,f16c")
namespace spectral_kernels::cpu::avx2 {
#define SK_NAME "avx2"
#define SK_VECTOR_BYTES 32
#define SK_MR 4
#define SK_NV 3
#define SK_PV 3
#define SK_BLOCK_K 128
#define SK_UNROLL_K 2
#define SK_READ_ALONG 0
#define SK_IN_ORDER 1
#define SK_FETCH_AHEAD 1
#define SK_HAS_F16C 1
#define SK_HAS_BF16_DOT 0
#include "table.inl"
}  // namespace spectral_kernels::cpu::avx2
SK_TARGET_END
#endif
