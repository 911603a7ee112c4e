// What Kronecker factors need beside the products of products.h.
#pragma once

#include <vector>

#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

// overflow[i] <- kInfinityBits where keep F + scale X Xᵀ of matrix i, source X and momentum F, has
// an element that is not finite.
int launch_overflow(const std::vector<Entry>& entries, const uint32_t* largest, uint32_t* overflow,
                    void* stream);

}  // namespace spectral_kernels::cuda
