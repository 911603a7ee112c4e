// AMX-BF16 (Sapphire Rapids and later): the AVX512-BF16 set with its bf16 products on tiles. With
// SK_EMULATE_TILES the tiles are emulated and nothing else of the processor is asked for.
#if defined(__x86_64__) || defined(SK_EMULATE_TILES)
#if !defined(SK_EMULATE_TILES)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"

#if defined(SK_EMULATE_TILES)
#define SK_HAS_F16C 0
#define SK_HAS_BF16_DOT 0
#else
#define SK_HAS_F16C 1
#define SK_HAS_BF16_DOT 1
#if defined(__clang__)
#pragma clang attribute push(                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,"            \
                          "avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#endif
namespace spectral_kernels::cpu::amx {
#define SK_VECTOR_BYTES 64
#define SK_MR 8
#define SK_NV 2
#define SK_PV 2
#define SK_BLOCK_K 192
#include "amx_product.inl"

const Kernels& table() {
  static const Kernels kTable = [] {
    Kernels kernels = avx512bf16::table();
    kernels.name = "amx";
    kernels.product[int(Kind::kBF16)] = tile_product_blocks;
    kernels.multiply_adds[int(Kind::kBF16)] = tile_multiply_adds;
    return kernels;
  }();
  return kTable;
}
}  // namespace spectral_kernels::cpu::amx
#if !defined(SK_EMULATE_TILES)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
