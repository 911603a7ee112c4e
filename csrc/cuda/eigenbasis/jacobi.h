// Eigenvalues and eigenvectors of symmetric matrices that fit on chip: one block a matrix, no
// synchronisation with the host.
#pragma once

#include <cstdint>
#include <vector>

#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

constexpr int kMostJacobiRows = 128;

struct EigenResults {
  double* values;   // n a matrix, descending
  double* vectors;  // n x n a matrix from `square` of its entry on: column j belongs to value j
  int64_t* sweeps;  // one a matrix, -1 where the matrix is not finite or has not converged
};

int64_t jacobi_bytes(int rows);

// Of (A + Aᵀ) / 2. Columns have their element of largest magnitude, the first of equals, positive;
// the zero matrix has the identity. NaN where sweeps is -1. With `status` only of those matrices
// that have a negative one.
int launch_eigenbasis(const std::vector<Entry>& entries, const uint32_t* largest,
                      const int64_t* status, const EigenResults& results, void* stream);

}  // namespace spectral_kernels::cuda
