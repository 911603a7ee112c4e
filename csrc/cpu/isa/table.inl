// The table of this instruction set.

#include "elementwise.inl"

static const Kernels kTable = {
    SK_NAME,
    {Simd<float>::kPanel, Simd<double>::kPanel, SK_HAS_BF16_DOT ? Simd<float>::kPanel : 0},
    {product_blocks<float, float>, product_blocks<double, double>,
#if SK_HAS_BF16_DOT
     product_blocks<float, uint32_t>
#else
     nullptr
#endif
    },
    {pack_blocks<float>, pack_blocks<double>, SK_HAS_BF16_DOT ? pack_blocks<float> : nullptr},
    {combine_blocks<float>, combine_blocks<double>},
    {scale_blocks<float>, scale_blocks<double>},
    {column_sums_of<float>, column_sums_of<double>},
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
};
