// Eigenbases of symmetric matrices and their refresh, composed for torch. What is here may wait for
// the device.
#pragma once

#include <vector>

#include "../../tensor.h"

namespace spectral_kernels::cuda {

// Eigenvalues, descending, and eigenvectors of (count, n, n) matrices in fp64, the largest element
// of each vector positive; NaN where there are none.
struct Eigen {
  Tensor values, vectors;
};

// Jacobi's method on chip where matrices fit, else LAPACK's like, matrix by matrix so that no bit
// depends on the batch.
Eigen eigen_of(const Tensor& a, const char* op);

// One round of orthogonal iteration of one matrix, as reference/eigenbasis.py specifies it, and the
// descending order of the old columns.
struct Refreshed {
  Tensor values, basis, order;
};
Refreshed refreshed_basis(const Tensor& q, const Tensor& a, bool sort, const char* op);

}  // namespace spectral_kernels::cuda
