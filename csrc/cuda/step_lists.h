// What the list steps share on the side of torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "list_step.h"

namespace spectral_kernels::cuda {

// The counter of matrices that are numbered from `first` on.
Counter counter_of(const at::Tensor& steps, int64_t first, int64_t count);

// nonfinite="raise": the one option that waits for the device. `largest` has one number for every
// matrix of the list, in its order, and is used up.
void raise_nonfinite(const std::vector<Entry>& entries, at::TensorList params,
                     const char* momentum_name, const at::Tensor& largest, const char* op);

// The same for one list of states or parameters; those without elements are left out.
void raise_nonfinite(at::TensorList list, const char* name, const char* op);

}  // namespace spectral_kernels::cuda
