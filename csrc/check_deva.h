// Options of deva_step_, and their checks.
#pragma once

#include "step_calls.h"
#include "variance.h"

namespace spectral_kernels {

// The variance of that name, after a check of everything that only this step has. V may be bfloat16
// if `narrow`.
Variance check_deva(const BasisLists& lists, const DevaOptions& options, bool narrow);

}  // namespace spectral_kernels
