// Eigendecomposition of a symmetric tridiagonal fp64 matrix by divide and conquer.
#pragma once

#include <cstdint>
#include <vector>

#include "../workspace.h"

namespace spectral_kernels::cpu {

// Scratch memory: n rows of a length that a packed matrix fits into, and `right` half of that.
struct DivideSpace {
  // `left` are left_bytes() of the caller's.
  DivideSpace(Workspace& workspace, int64_t n, double* left);
  static size_t left_bytes(int64_t n);
  static size_t bytes(int64_t n);

  int64_t pitch, right_pitch;
  double *left, *right, *z, *spare, *lines;
};

// T = sum of d'_k z_k z_kᵀ with ascending d', which takes the place of d. e[i] stands between d[i]
// and d[i + 1]. z_k is row k of space.spare. False if it did not converge.
bool tridiagonal_eigen(int64_t n, std::vector<double>& d, const std::vector<double>& e,
                       const DivideSpace& space, int threads);

}  // namespace spectral_kernels::cpu
