// Products of lists of matrices by mma.sync: those known to be symmetric, of which one triangle is
// computed, and Q X. Matrices are packed in 16 bits, in one or two planes (high and low halves).
#pragma once

#include <vector>

#include "../base/list_step.h"
#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

enum class Shape : int {
  kGram,    // X Xᵀ
  kSquare,  // A B of commuting symmetric matrices
  kWide,    // A X
};

// How matrices are stored, and what `multiply` takes.
struct Format {
  int planes = 1;
  bool f16 = false;
  bool lower = false;  // of a symmetric matrix only the tiles on and below the diagonal
};

// D = (alpha A B + beta C) factor^power + gamma I. A, B, C and D are workspaces: X has rows of
// `line` numbers from e.packed.plane on, a square matrix rows of square_line(e) from e.square on.
struct Product {
  Shape shape = Shape::kSquare;
  Format format;  // of A and B
  Format c_format, d_format;
  const uint16_t *a = nullptr, *b = nullptr, *c = nullptr;
  uint16_t* d = nullptr;  // null: the target of the entry
  float alpha = 1, beta = 0, gamma = 0;
  const float* factor = nullptr;  // one a matrix; null: 1
  int power = 1;
  bool exact = false;  // sum X Xᵀ of one plane of fp16 as accurately as that of two planes: in fp32
  int unshift = 0;     // the target is divided by packing's power of two for X so many times
  bool x_f16 = false;  // X was packed as fp16
  // Largest elements of other matrices that this is a product of, packed as fp16, one a matrix:
  // their powers of two are undone as well, and one that is not finite makes the target NaN.
  const uint32_t* others[3] = {};
  Update update;  // with the target
};

// Tiles and parts. A sum is cut where (rows, columns, planes, processor) say, and parts are added
// in their order; the size of the tiles, which changes no bit, also depends on the list.
struct Tiling {
  int tile = 64;
  int64_t squares = 0;  // elements of a workspace for square matrices, both planes
  int64_t parts = 0;    // floats of partial tiles
  int64_t tiles = 0;    // arrival counters, zero before and after
  double clocks = 0;    // of the average product, by the cost model
};

// Fills in what entries need for products of X in `planes` planes and of square matrices in
// `square_planes`, on a kind of processor that has so many multiprocessors.
Tiling place_products(std::vector<Entry>& entries, int planes, int square_planes,
                      int multiprocessors);
// The same for wgmma.
Tiling place_products_wgmma(std::vector<Entry>& entries, int multiprocessors);

struct ProductBuffers {
  float* parts = nullptr;
  uint32_t* arrived = nullptr;
  uint32_t* largest = nullptr;  // raised where an update looks
  uint32_t* queue = nullptr;    // of launch_queue: one and one a matrix, zero before and after
};

int launch_product(const std::vector<Entry>& entries, const Product& product, int tile,
                   const ProductBuffers& buffers, void* stream);

int64_t product_shared_bytes(int planes, int tile);

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

// Makes those results X Xᵀ NaN throughout whose X is not finite, which their diagonals show.
int launch_spread_nonfinite(const std::vector<Entry>& entries, void* stream);

// The same by wgmma and TMA: one plane, tiles of 256 by two blocks, sm_90 only, no more blocks at a
// time than `multiprocessors`. Has run on no card yet.
int launch_product_wgmma(const std::vector<Entry>& entries, const Product& product,
                         const ProductBuffers& buffers, int multiprocessors, void* stream);

}  // namespace spectral_kernels::cuda
