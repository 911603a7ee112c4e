// QR by Householder reflections of packed matrices.
#pragma once

#include "product.h"

namespace spectral_kernels::cpu {

// P <- the orthonormal factor of P (n x n, packed, F32 or F64) whose R has a non-negative diagonal,
// and its transpose, by Householder reflections in blocks, H = I - V T Vᵀ. The columns must be of a
// length near 1. `free` are five matrices of the same shape; P and Pᵀ may change places with some
// of them. It cannot fail: whatever the rank, the columns are orthonormal to within rounding.
void orthonormal_factor(Panels& p, Panels& pt, Panels* free, int threads);

}  // namespace spectral_kernels::cpu
