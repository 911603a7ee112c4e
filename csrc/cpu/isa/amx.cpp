// AMX-BF16 (Sapphire Rapids and later): the AVX512-BF16 set with bf16 products on tiles, and fp32
// products as sums of bf16 ones. With SK_EMULATE_TILES the tiles are emulated and nothing else of
// the processor is asked for.
#if defined(__x86_64__) || defined(SK_EMULATE_TILES)
#if !defined(SK_EMULATE_TILES)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "../tiles.h"
#include "sets.h"
#include "target.h"

#if defined(SK_EMULATE_TILES)
#define SK_HAS_F16C 0
#define SK_HAS_BF16_DOT 0
#else
#define SK_HAS_F16C 1
#define SK_HAS_BF16_DOT 1
#if defined(__clang__)
SK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#else
SK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c" SK_WIDEST_VECTORS)
#endif
#endif
namespace spectral_kernels::cpu::amx {
#define SK_VECTOR_BYTES 64
#define SK_MR 8
#define SK_NV 2
#define SK_PV 2
#include "amx_product.inl"

// Large jobs bring fewer panels into form. With 1 two threads took a fifth longer for gram of 1024,
// kron_precondition of 768 and their like.
constexpr double kLate = 0.1;

const Kernels& table() {
  static const Kernels kTable = [] {
    Kernels kernels = avx512bf16::table();
    kernels.name = "amx";
    kernels.fp32 = "tiles";
    kernels.pair_rate = 4;  // measured on Emerald Rapids
    kernels.product[int(Kind::kF32)] = split_product_blocks;
    kernels.product[int(Kind::kBF16)] = pair_product_blocks;
    // Measured: what a panel costs to bring into the form of the instructions, beside a block.
    kernels.jobs[int(Kind::kF32)] = {kSplitEdge, 1.5, 0.8, kLate, SplitScratch::bytes};
    kernels.jobs[int(Kind::kBF16)] = {kPairEdge, 1.3, 0, kLate, PairScratch::bytes};
    kernels.multiply_adds[int(Kind::kBF16)] = tile_multiply_adds;
    kernels.reads_rows = reads_rows;
    kernels.image_words[int(Kind::kBF16)] = kStepWords;
    return kernels;
  }();
  return kTable;
}

const Kernels& fma_table() {
  static const Kernels kTable = [] {
    const Kernels& base = avx512bf16::table();
    Kernels kernels = table();
    kernels.fp32 = base.fp32;
    kernels.pair_rate = 6;
    kernels.product[int(Kind::kF32)] = base.product[int(Kind::kF32)];
    kernels.jobs[int(Kind::kF32)] = base.jobs[int(Kind::kF32)];
    return kernels;
  }();
  return kTable;
}
}  // namespace spectral_kernels::cpu::amx
#if !defined(SK_EMULATE_TILES)
SK_TARGET_END
#endif
#endif
