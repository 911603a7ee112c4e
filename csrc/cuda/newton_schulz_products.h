// Newton–Schulz of lists of matrices of any size, as a sequence of grouped products.
#pragma once

#include <vector>

#include "newton_schulz.h"
#include "symmetric_matmul.h"

namespace spectral_kernels::cuda {

// Square matrices are held as X is. Two planes of fp16 keep fp32 accuracy at three times the cost
// of a product; 16-bit X is iterated on in its own format in the standard form, which costs less
// than the Gram form in two planes unless a matrix is this much longer than it is wide: five steps
// take 7.5 r + 2.5 against 2.5 r + 26 times n³ multiplications with columns = r rows.
constexpr int kLeastGramRatio = 5;

// Workspaces for the large matrices of a list, in elements; X is `packed`, as in OnChipSizes.
struct ProductPlan {
  std::vector<Entry> entries;  // placed
  bool f16 = false;            // X
  int planes = 1;              // X
  int square_planes = 1;
  int wgmma = 0;       // multiprocessors that wgmma runs on; 0: mma.sync
  bool queue = false;  // all products in one launch
  Tiling tiling;
  int64_t packed = 0;
  static constexpr int kSquares = 5;  // workspaces of tiling.squares elements
};

struct ProductWorkspaces {
  uint16_t *x = nullptr, *next = nullptr;  // both of `packed` elements, x filled
  uint16_t* squares = nullptr;
  const float* factor = nullptr;  // 1 / norm, in the packed scale
  ProductBuffers buffers;
};

// By wgmma or mma.sync: tiles and parts for a kind of processor, and a product.
void place(ProductPlan& plan, int multiprocessors);
int launch_product(const ProductPlan& plan, const Product& product, const ProductBuffers& buffers,
                   void* stream);

// All segments of all matrices, and the update. Needs segments without schatten8.
int launch_products(const ProductPlan& plan, const std::vector<Segment>& segments,
                    const ProductWorkspaces& workspaces, const Update& update, void* stream);

}  // namespace spectral_kernels::cuda
