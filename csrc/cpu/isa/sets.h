// The instruction sets that were compiled in.
#pragma once

#include "../tiles.h"

namespace spectral_kernels::cpu {
namespace baseline {
const Kernels& table();
}
#if defined(__x86_64__) || defined(SK_EMULATE_TILES)
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512bf16 {
const Kernels& table();
}
namespace amx {
const Kernels& table();
const Kernels& fma_table();  // F32 products as AVX-512 has them
}  // namespace amx
#endif
}  // namespace spectral_kernels::cpu
