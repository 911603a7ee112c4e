// A sequence of products as one launch: a queue of tiles that blocks take from.
#pragma once

#include <vector>

#include "product.h"

namespace spectral_kernels::cuda {

// What launch_product does for one product after the other, with the same bits. X is in the format
// `x`; products of square matrices take `square_planes`, two of fp16 or as many as X. A matrix must
// not be an operand of one product and the result of the next but for its own entry.
int launch_queue(const std::vector<Entry>& entries, const std::vector<Product>& products,
                 const Format& x, int square_planes, int tile, const ProductBuffers& buffers,
                 void* stream);

}  // namespace spectral_kernels::cuda
