// Inverse roots from an eigendecomposition, for the matrices that an iteration does not serve.
#pragma once

#include <vector>

#include "../base/matrix_list.h"
#include "../eigenbasis/jacobi.h"
#include "iteration.h"

namespace spectral_kernels::cuda {

// Where `status` is negative: the root, its status, and its residual, from eigenvalues and vectors
// of launch_eigenbasis. reference/inverse_root.py specifies the cut, the residual and when it is
// accepted. Needs no more shared memory than the decomposition.
int launch_eigen_root(const std::vector<Entry>& entries, const RootSchedules& schedules,
                      const EigenResults& eigen, const RootResults& results, void* stream);

}  // namespace spectral_kernels::cuda
