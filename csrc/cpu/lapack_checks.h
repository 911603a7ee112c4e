// Whether factors multiply to what they came from, on a few fixed probes: n² operations where the
// factorization took n³. All matrices are contiguous, row-major, fp64.
//
// A right result passes: the limits are 64 (n + 8) u, u = 2^-53, relative to the norms that
// LAPACK's backward errors are relative to, and LAPACK's own test programs ask for 30 to 50 times n
// u of matrices made to be hard. A wrong one is off by 1e-8 at the very least, in all faults seen.
#pragma once

#include <cstdint>

namespace spectral_kernels::cpu {

// A (V y) = V (diag(values) y) and Vᵀ (V y) = y. The rows of `vt` are the eigenvectors.
bool is_eigendecomposition(int64_t n, const double* a, const double* values, const double* vt);
// U is m x k, Vᵀ is k x n, k the smaller of m and n.
struct Svd {
  int64_t m, n;
  const double *u, *s, *vt;
};
// A y = U (diag(s) (Vᵀ y)), and U and V have orthonormal columns.
bool is_svd(const double* a, const Svd& svd);
// B y = U (diag(kept) (Vᵀ y)).
bool is_polar(const double* b, const Svd& svd, const double* kept);

}  // namespace spectral_kernels::cpu
