// The Schatten-8 norm of matrices that are too large for a chip.
#pragma once

#include "products.h"

namespace spectral_kernels::cuda {

// factor[i] <- 1 / max(norm_factor ||X||_S8, eps) from 1 / ||X||_F, with ||X||_S8⁴ = ||(X Xᵀ)²||_F.
// `norms` are those of the prologue, whose workspaces serve again.
int launch_schatten_norm(const ProductPlan& plan, const ProductWorkspaces& workspaces,
                         const Norms& norms, float norm_factor, float eps, void* stream);

}  // namespace spectral_kernels::cuda
