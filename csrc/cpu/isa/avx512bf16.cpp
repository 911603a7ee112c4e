// AVX-512 with bf16 dot products (Zen 4, Cooper Lake, Sapphire Rapids and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"
#include "target.h"

SK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c" SK_WIDEST_VECTORS)
namespace spectral_kernels::cpu::avx512bf16 {
#define SK_NAME "avx512bf16"
#define SK_VECTOR_BYTES 64
#define SK_MR 8
#define SK_NV 2
#define SK_PV 2
#define SK_HAS_F16C 1
#define SK_HAS_BF16_DOT 1
#include "table.inl"
}  // namespace spectral_kernels::cpu::avx512bf16
SK_TARGET_END
#endif
