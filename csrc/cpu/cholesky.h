// Cholesky factors of packed matrices, inverted.
#pragma once

#include "product.h"

namespace spectral_kernels::cpu {

// W = R⁻¹ for Rᵀ R = S, with S, W and Wᵀ packed (n x n); S is destroyed, W and Wᵀ are written on
// their triangles and the diagonal blocks. False if a pivot is not positive.
bool cholesky_inverse(const Panels& s, const Panels& w, const Panels& wt, int threads);

}  // namespace spectral_kernels::cpu
