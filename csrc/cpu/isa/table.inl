// The table of this instruction set, and `table()`, by which it is found.

#include "elementwise.inl"
#include "hash.inl"
#include "householder.inl"
#include "tridiagonal.inl"

// `count` elements of a line from column `first` on.
static void round_line(const uint32_t* __restrict x, uint32_t seed, uint32_t first, int64_t count,
                       uint16_t* __restrict to) {
  for (int64_t j = 0; j < count; j++) to[j] = rounded(x[j], seed, first + uint32_t(j));
}

// Edge of the largest job in elements. 192 fp32 numbers square are 147 KB, which stay in an L2 of
// 512 KiB or more beside the two operands' stretches.
constexpr int kEdge = 192, kEdgeF64 = 128;

template <class T>
static size_t result_bytes(int64_t edge) {
  return size_t(edge * edge) * sizeof(Block<T>);
}

static const Kernels kTable = {
    SK_NAME,
    "fma",
    2,  // of the dot products, measured on Zen 5
    {Simd<float>::kPanel, Simd<double>::kPanel, SK_HAS_BF16_DOT ? Simd<float>::kPanel : 0},
    {product_blocks<float, float>, product_blocks<double, double>,
#if SK_HAS_BF16_DOT
     product_blocks<float, uint32_t>
#else
     nullptr
#endif
    },
    {{kEdge / Simd<float>::kPanel, 0, 0, 1, result_bytes<float>},
     {kEdgeF64 / Simd<double>::kPanel, 0, 0, 1, result_bytes<double>},
     {kEdge / Simd<float>::kPanel, 0, 0, 1, result_bytes<float>}},
    {pack_blocks<float>, pack_blocks<double>, SK_HAS_BF16_DOT ? pack_blocks<float> : nullptr},
    {combine_blocks<float>, combine_blocks<double>},
    {scale_blocks<float>, scale_blocks<double>},
    {column_sums_of<float>, column_sums_of<double>},
    {reflect_panel<float>, reflect_panel<double>},
    {square_average<float>, square_average<double>},
    {adapted_length<float>, adapted_length<double>},
    {adam_moments<float>, adam_moments<double>},
    {momentum<float>, momentum<double>},
    {variance_adaptation<float>, variance_adaptation<double>},
    {sign_adaptation<float>, sign_adaptation<double>},
    max_abs_bits,
    {multiply_adds<float, float>, multiply_adds<double, double>,
#if SK_HAS_BF16_DOT
     multiply_adds<float, uint32_t>
#else
     nullptr
#endif
    },
    round_line,
    symmetric_times,
    add_lines,
    dot_lines,
    secular_sums,
    {multiply_in_place<float>, multiply_in_place<double>},
};

const Kernels& table() { return kTable; }
