// Options of deva_step_, and their checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <string>

#include "variance.h"

namespace spectral_kernels {

// The variance of that name, after a check of everything that only this step has.
Variance check_deva(at::TensorList params, at::TensorList exp_avg_sqs, at::ArrayRef<double> scales,
                    const std::string& eps_mode, const std::string& norm,
                    const std::string& variance, bool reference);

}  // namespace spectral_kernels
