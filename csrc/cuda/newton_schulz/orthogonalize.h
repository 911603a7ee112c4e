// Newton–Schulz as a part of other steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace spectral_kernels::cuda {

// X <- the matrix sign of X by these rows, Schatten-8 scaled, of every matrix of a list of batches
// in fp32.
void orthogonalize(const std::vector<at::Tensor>& list, at::ArrayRef<double> rows,
                   at::ScalarType compute_dtype, const char* op);

}  // namespace spectral_kernels::cuda
