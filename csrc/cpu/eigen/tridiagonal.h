// A symmetric fp64 matrix as Q T Qᵀ with a tridiagonal T, by Householder reflections.
#pragma once

#include <vector>

#include "../product.h"

namespace spectral_kernels::cpu {

struct Tridiagonal {
  Tridiagonal(Workspace& workspace, int64_t n);
  static size_t bytes(int64_t n);

  int64_t n, pitch;          // a line goes up to a whole panel
  std::vector<double> d, e;  // the diagonal of T, and what stands below it
  // Q = H_0 H_1 ... with H_j = I - tau_j v_j v_jᵀ. v_j is line j: zeros up to j, 1 at j + 1.
  std::vector<double> tau;
  double* lines;
};

// `a`, packed in F64, is symmetric and of a largest element near 1; only its lower triangle is
// read. It is used up. An element of T is within some u ||A|| of what it would be for a matrix that
// is as near to A.
void tridiagonalize(const Panels& a, Tridiagonal& t, int threads);

// X <- Q X for a packed X (n x n), which is used up; `out` receives the result.
void apply_reflections(const Tridiagonal& t, const Panels& x, const Matrix& out, int threads);
size_t reflections_bytes(int64_t n);

}  // namespace spectral_kernels::cpu
