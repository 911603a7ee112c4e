// Newton–Schulz of lists of matrices of any size, as a sequence of grouped products.
#pragma once

#include <vector>

#include "../symmetric_matmul/product.h"
#include "on_chip.h"

namespace spectral_kernels::cuda {

// Square matrices are held as X is. Two planes of fp16 keep fp32 accuracy at three times the cost
// of a product; 16-bit X is iterated on in its own format in the standard form, which costs less
// than the Gram form in two planes unless a matrix is this much longer than it is wide: five steps
// take 7.5 r + 2.5 against 2.5 r + 26 times n³ multiplications with columns = r rows.
constexpr int kLeastGramRatio = 5;

// All segments of all matrices, and the update. Needs segments without schatten8.
int launch_products(const ProductPlan& plan, const std::vector<Segment>& segments,
                    const ProductWorkspaces& workspaces, const Update& update, void* stream);

}  // namespace spectral_kernels::cuda
