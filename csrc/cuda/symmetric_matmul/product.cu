// Grouped products: one block a tile and part of the sum, parts added by whichever block arrives
// last.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../base/launch.h"
#include "product.h"
#include "stream_k.h"
#include "tile_mma.h"

namespace spectral_kernels::cuda {
namespace {

template <int kTile, int kPlanes, bool kF16, bool kWideB>
__global__ void __launch_bounds__(kTile * 2, kPlanes == 1 ? 2 : 1)
    product_kernel(const __grid_constant__ Table table, const Product p,
                   const ProductBuffers buffers) {
  DYNAMIC_SHARED(char, shared);
  multiply_unit<kTile, kPlanes, kF16, kWideB>(unit_of(table, blockIdx.x, p.shape, kTile), p,
                                              buffers, shared);
}

// X Xᵀ of one plane of fp16, in fp32 accuracy.
template <int kTile>
__global__ void __launch_bounds__(kTile * 2, 1)
    exact_kernel(const __grid_constant__ Table table, const Product p,
                 const ProductBuffers buffers) {
  DYNAMIC_SHARED(char, shared);
  multiply_unit<kTile, 1, true, false, true>(unit_of(table, blockIdx.x, p.shape, kTile), p, buffers,
                                             shared);
}

constexpr int kGuardThreads = 256;

// One block a matrix. A diagonal may also have overflowed, so X has the last word.
__global__ void __launch_bounds__(kGuardThreads)
    spread_nonfinite_kernel(const __grid_constant__ Table table) {
  DYNAMIC_SHARED(int, found);
  const Place at = place(table, blockIdx.x, [](const Entry&) { return int64_t(1); });
  const Entry& e = *at.entry;
  const auto any = [&](const Matrices& m, int64_t rows, int64_t columns, bool diagonal) {
    if (threadIdx.x == 0) *found = 0;
    __syncthreads();
    bool bad = false;
    for (int64_t i = threadIdx.x; i < rows * columns; i += kGuardThreads) {
      const int64_t row = i / columns, column = diagonal ? row : i % columns;
      const float x = read(m, at.matrix * m.batch + row * m.row + column * m.column);
      bad = bad || !finite(bits_of(x) & 0x7fffffffu);
    }
    if (bad) *found = 1;
    __syncthreads();
    return *found != 0;
  };
  if (!any(e.target, e.rows, 1, true)) return;
  // All have read what was found.
  __syncthreads();
  if (!any(e.source, e.rows, e.columns, false)) return;
  for (int64_t i = threadIdx.x; i < int64_t(e.rows) * e.rows; i += kGuardThreads)
    write(e.target,
          at.matrix * e.target.batch + i / e.rows * e.target.row + i % e.rows * e.target.column,
          float_of(0x7fc00000u));
}

// Cost model

// Clocks of one multiprocessor: 64 and 128 wide tiles, a step of 32, bound by shared memory; a part
// of a tile goes to L2 and back at 24 bytes a clock. What is not a step is counted in the machine
// code for sm_90a of nvcc 13.0: some 600 instructions of a warp before the first step; behind the
// last one 6 for every sum of a thread, then 48 for eight elements in a row and 110 for eight of
// the mirror image; a scheduler has 1 or 2 of the tile's warps. Has run on no card yet.
double clocks_of(int64_t steps, int tile, int planes, int64_t chunks) {
  const double step = (tile == 64 ? 192 : 512) * (planes == 2 ? 2.5 : 1);
  const double part = tile * tile * 4 / 24.0;
  const double sums = tile / 2.0, warps = tile / 64.0;  // of a thread, of a scheduler
  const double ends = warps * (600 + 6 * sums + (48 + 110) * sums / 8 * (planes == 2 ? 1.3 : 1));
  return double(over(steps, chunks)) * step + ends +
         (chunks > 1 ? part + part * double(chunks - 1) / double(chunks) : 0);
}

// Of `items` equal items on that many multiprocessors, the last ones alone.
double makespan(double items, double clocks, int multiprocessors) {
  return (items / multiprocessors + 1) * clocks;
}

// The number of parts that is best for one matrix alone, whatever list it is in.
int chunks_for(int64_t down, int64_t steps, int planes, int multiprocessors) {
  double least = std::numeric_limits<double>::max();
  int best = 1;
  for (const int tile : {64, 128})
    for (int wanted = 1; wanted <= kMostChunks; wanted++) {
      const int64_t chunks = over(steps, over(steps, wanted));  // none of them empty
      const int64_t rows = over(down, tile / 64), tiles = rows * (rows + 1) / 2;
      const double time =
          makespan(double(tiles * chunks), clocks_of(steps, tile, planes, chunks), multiprocessors);
      if (time >= least) continue;
      least = time;
      best = int(chunks);
    }
  return best;
}

// One product of every kind for the whole list, with tiles of one size.
double list_clocks(const std::vector<Entry>& entries, int planes, int square_planes, int tile,
                   int multiprocessors) {
  double sum = 0;
  for (const Shape shape : {Shape::kGram, Shape::kSquare, Shape::kWide}) {
    double work = 0, longest = 0;
    for (const Entry& e : entries) {
      const int64_t chunks = chunks_of(e, shape);
      const double clocks = clocks_of(steps_of(e, shape), tile,
                                      shape == Shape::kSquare ? square_planes : planes, chunks);
      work += clocks * double(e.count * tiles_of(e, shape, tile) * chunks);
      longest = std::max(longest, clocks);
    }
    sum += work / multiprocessors + longest;
  }
  return sum;
}

template <auto kernel, int kTile>
int launch(const std::vector<Entry>& entries, const Product& product, const ProductBuffers& buffers,
           void* stream) {
  const size_t bytes = size_t(product_shared_bytes(product.format.planes, kTile));
  if (const int error = allow_shared<kernel>(bytes); error != 0) return error;
  return for_each_table(
      entries,
      [&](const Entry& e) {
        return tiles_of(e, product.shape, kTile) * chunks_of(e, product.shape);
      },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(kernel, dim3(blocks), dim3(kTile * 2), bytes, stream, table, product, buffers);
        return launched();
      });
}

template <int kTile, bool kWideB>
int launch_format(const std::vector<Entry>& entries, const Product& product,
                  const ProductBuffers& buffers, void* stream) {
  if (product.format.planes == 2)
    return launch<product_kernel<kTile, 2, true, kWideB>, kTile>(entries, product, buffers, stream);
  if (product.exact) return launch<exact_kernel<kTile>, kTile>(entries, product, buffers, stream);
  if (product.format.f16)
    return launch<product_kernel<kTile, 1, true, kWideB>, kTile>(entries, product, buffers, stream);
  return launch<product_kernel<kTile, 1, false, kWideB>, kTile>(entries, product, buffers, stream);
}

// Places for square matrices, and for parts of tiles where `divided(entry)`.
template <class Divided>
Tiling place_tiles(std::vector<Entry>& entries, int tile, Divided divided) {
  Tiling tiling;
  tiling.tile = tile;
  for (Entry& e : entries) {
    e.square = tiling.squares;
    e.product.tile = tiling.tiles;
    tiling.squares += e.count * e.rows * square_line(e) * 2;
    if (divided(e)) tiling.tiles += e.count * tiles_of(e, Shape::kGram, tile);
  }
  tiling.parts = tiling.tiles * kMostChunks * tile * tile;
  return tiling;
}

}  // namespace

int64_t product_shared_bytes(int planes, int tile) {
  if (tile == 64) return (planes == 2 ? Stages<64, 2>::kBytes : Stages<64, 1>::kBytes) + kUnitBytes;
  return (planes == 2 ? Stages<128, 2>::kBytes : Stages<128, 1>::kBytes) + kUnitBytes;
}

Tiling place_products(std::vector<Entry>& entries, int planes, int square_planes,
                      int multiprocessors) {
  for (Entry& e : entries) {
    const int64_t down = square_line(e) / 64;
    e.product.chunks = chunks_for(down, steps_of(e, Shape::kGram), planes, multiprocessors);
    e.product.square_chunks =
        chunks_for(down, steps_of(e, Shape::kSquare), square_planes, multiprocessors);
  }
  const auto clocks = [&](int size) {
    return list_clocks(entries, planes, square_planes, size, multiprocessors);
  };
  const double small = clocks(64), large = clocks(128);
  Tiling tiling = place_tiles(entries, large < small ? 128 : 64, [](const Entry& e) {
    return e.product.chunks > 1 || e.product.square_chunks > 1;
  });
  tiling.clocks = std::min(small, large) / 3;
  return tiling;
}

Tiling place_products_wgmma(std::vector<Entry>& entries, int multiprocessors) {
  // Two blocks make a tile. A step of 64, at 2048 multiply-adds a clock; a part goes to L2 and back
  // at 24 bytes a clock.
  constexpr int kTile = kWgmmaTile, kStep = 64;
  constexpr double kStepClocks = kTile * kTile / 2 * kStep / 2048.0;
  constexpr double kPartClocks = 2 * kTile * kTile / 2 * 4 / 24.0;
  const auto cut = [&](const Entry& e, Shape shape) {
    return stream_k(tiles_of(e, shape, kTile), steps_of(e, shape) * kDepth / kStep,
                    std::max(multiprocessors / 2, 1), kStepClocks, kPartClocks, kMostChunks);
  };
  for (Entry& e : entries) {
    e.product.stretch = cut(e, Shape::kGram).length;
    e.product.square_stretch = cut(e, Shape::kSquare).length;
  }
  Tiling tiling = place_tiles(entries, kTile, [&](const Entry& e) {
    return cut(e, Shape::kGram).divides() || cut(e, Shape::kSquare).divides();
  });
  tiling.tiles *= 2;
  return tiling;
}

int launch_product(const std::vector<Entry>& entries, const Product& product, int tile,
                   const ProductBuffers& buffers, void* stream) {
  const bool wide = product.shape == Shape::kWide;
  // cudaErrorInvalidValue: mma.sync reads A and B whole, and only A X moves a parameter.
  if (product.format.lower || (product.update.in_place && !wide)) return 1;
  // Nor is there room for more planes of C than of the operands.
  if (product.c != nullptr && product.c_format.planes > product.format.planes) return 1;
  if (tile == 64)
    return wide ? launch_format<64, true>(entries, product, buffers, stream)
                : launch_format<64, false>(entries, product, buffers, stream);
  return wide ? launch_format<128, true>(entries, product, buffers, stream)
              : launch_format<128, false>(entries, product, buffers, stream);
}

void place(ProductPlan& plan, int multiprocessors) {
  plan.tiling = plan.wgmma != 0 ? place_products_wgmma(plan.entries, multiprocessors)
                                : place_products(plan.entries, plan.planes, plan.square_planes,
                                                 multiprocessors);
}

int launch_product(const ProductPlan& plan, const Product& product, const ProductBuffers& buffers,
                   void* stream) {
  if (plan.wgmma != 0)
    return launch_product_wgmma(plan.entries, product, buffers, plan.wgmma, stream);
  return launch_product(plan.entries, product, plan.tiling.tile, buffers, stream);
}

int launch_spread_nonfinite(const std::vector<Entry>& entries, void* stream) {
  return for_each_table(
      entries, [](const Entry&) { return int64_t(1); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(spread_nonfinite_kernel, dim3(blocks), dim3(kGuardThreads), sizeof(int), stream,
               table);
        return launched();
      });
}

}  // namespace spectral_kernels::cuda
