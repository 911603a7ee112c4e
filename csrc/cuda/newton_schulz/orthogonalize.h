// Newton–Schulz as a part of other steps.
#pragma once

#include <vector>

#include "../../tensor.h"

namespace spectral_kernels::cuda {

// X <- the matrix sign of X by these rows, Schatten-8 scaled, of every matrix of a list of batches
// in fp32.
void orthogonalize(const std::vector<Tensor>& list, ArrayRef<double> rows, ScalarType compute_dtype,
                   const char* op);

}  // namespace spectral_kernels::cuda
