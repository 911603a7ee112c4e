// What every processor of the platform has: SSE2 on x86-64, NEON on aarch64. 128-bit vectors.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"

namespace spectral_kernels::cpu::baseline {
#define SK_NAME "baseline"
#define SK_VECTOR_BYTES 16
#if defined(__aarch64__)  // 32 registers
#define SK_MR 8
#define SK_NV 2
#else  // 16 registers
#define SK_MR 4
#define SK_NV 2
#endif
#define SK_PV 4
#define SK_HAS_F16C 0
#define SK_HAS_BF16_DOT 0
#include "table.inl"
}  // namespace spectral_kernels::cpu::baseline
