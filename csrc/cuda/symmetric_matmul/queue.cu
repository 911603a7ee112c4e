// All products of an iteration in one launch. A launch a product drains and fills the device each
// time; here a matrix goes on as soon as its own tiles are finished.
#include <algorithm>

#include "../base/launch.h"
#include "queue.h"
#include "tile_mma.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kMostQueued = 64, kShapes = 3;

// Items in their order: product by product, and of each product all units of the list, so that
// others are at work while a matrix waits.
struct Queue {
  int count = 0;
  uint32_t first[kMostQueued + 1] = {};             // item of each product
  uint8_t before[kMostQueued + 1][kShapes] = {};    // products of each shape before it
  int64_t first_block[kShapes][kTableEntries + 1];  // as in Table, of a product of each shape
  Product products[kMostQueued];
};

// What a launch can carry, from CUDA 12.1 on.
static_assert(sizeof(Table) + sizeof(Queue) + sizeof(ProductBuffers) <= 32764);

HOST_DEVICE int64_t items_of(const Entry& e, Shape shape, int tile) {
  return tiles_of(e, shape, tile) * chunks_of(e, shape);
}

// Items of a matrix in the products that `before` counts.
DEVICE uint32_t items_before(const Entry& e, const uint8_t (&before)[kShapes], int tile) {
  int64_t items = 0;
  for (int shape = 0; shape < kShapes; shape++)
    items += before[shape] * items_of(e, Shape(shape), tile);
  return uint32_t(items);
}

// What a block is at; in shared memory, as registers are scarce. The first word is multiply_unit's.
struct Taken {
  uint32_t turn, item, matrix;
  uint32_t all;  // items of the matrix in the launch
};

DEVICE int product_of(const Queue& queue, uint32_t item) {
  int low = 0, high = queue.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (queue.first[middle] <= item)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Blocks take items in order, and what an item waits for comes before it. So of all items that are
// taken and not finished the first waits for none, and its block, which runs, finishes it: no block
// waits for one that has not begun, however many of them the device holds at a time.
template <int kTile, int kPlanes, bool kF16, int kSquarePlanes>
__global__ void __launch_bounds__(kTile * 2, kSquarePlanes == 1 ? 2 : 1)
    queue_kernel(const __grid_constant__ Table table, const __grid_constant__ Queue queue,
                 const ProductBuffers buffers) {
  DYNAMIC_SHARED(char, shared);
  Taken& taken = *reinterpret_cast<Taken*>(shared + Stages<kTile, kSquarePlanes>::kBytes);
  const uint32_t items = queue.first[queue.count];
  uint32_t *const next = buffers.queue, *const finished = buffers.queue + 1;
  for (;;) {
    if (threadIdx.x == 0) taken.item = atomicAdd(next, 1u);
    __syncthreads();
    const uint32_t item = taken.item;
    if (item >= items) {
      // Every block ends here: the last one leaves the counter as it was.
      if (threadIdx.x == 0 && item + 1 == items + gridDim.x) *next = 0;
      return;
    }
    const int step = product_of(queue, item);
    const Product& p = queue.products[step];
    const Unit unit =
        unit_of(table, queue.first_block[int(p.shape)], item - queue.first[step], p.shape, kTile);
    if (threadIdx.x == 0) {
      const Entry& e = *unit.at.entry;
      taken.matrix = uint32_t(unit.matrix);
      taken.all = items_before(e, queue.before[queue.count], kTile);
      wait_for(finished + unit.matrix, items_before(e, queue.before[step], kTile));
    }
    // A unit begins with a barrier of its own.
    if (p.shape == Shape::kWide)
      multiply_unit<kTile, kPlanes, kF16, true>(unit, p, buffers, shared);
    else if (kPlanes == kSquarePlanes || p.shape == Shape::kGram)
      multiply_unit<kTile, kPlanes, kF16, false>(unit, p, buffers, shared);
    else
      multiply_unit<kTile, 2, true, false>(unit, p, buffers, shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      uint32_t* own = finished + taken.matrix;
      if (atomicAdd(own, 1u) + 1 == taken.all) *own = 0;
    }
  }
}

// As many of the products from `begin` on as one launch can take.
Queue queue_of(const Table& table, const std::vector<Product>& products, size_t begin, int tile) {
  Queue queue;
  int64_t items[kShapes];
  for (int shape = 0; shape < kShapes; shape++) {
    items[shape] = 0;
    for (int i = 0; i < table.count; i++) {
      queue.first_block[shape][i] = items[shape];
      items[shape] += table.entries[i].count * items_of(table.entries[i], Shape(shape), tile);
    }
  }
  constexpr int64_t kMostItems = 0x7fffffff;
  for (size_t i = begin; i < products.size() && queue.count < kMostQueued; i++) {
    const int shape = int(products[i].shape), own = queue.count;
    if (queue.first[own] + items[shape] > kMostItems) break;
    queue.products[queue.count++] = products[i];
    queue.first[own + 1] = uint32_t(queue.first[own] + items[shape]);
    std::copy_n(queue.before[own], kShapes, queue.before[own + 1]);
    queue.before[own + 1][shape]++;
  }
  return queue;
}

// More blocks than two products have items for would only wait.
uint32_t useful_blocks(const Queue& queue) {
  uint32_t most = 1;
  for (int i = 0; i < queue.count; i++)
    most = std::max(most, queue.first[std::min(i + 2, queue.count)] - queue.first[i]);
  return most;
}

template <int kTile, int kPlanes, bool kF16, int kSquarePlanes>
int launch(const std::vector<Entry>& entries, const std::vector<Product>& products,
           const ProductBuffers& buffers, void* stream) {
  constexpr auto kernel = queue_kernel<kTile, kPlanes, kF16, kSquarePlanes>;
  const size_t bytes = size_t(product_shared_bytes(kSquarePlanes, kTile));
  if (const int error = allow_shared<kernel>(bytes); error != 0) return error;
  int fitting = 0;
  if (const int error = fitting_blocks<kernel>(kTile * 2, bytes, fitting); error != 0) return error;
  return for_each_table(
      entries,
      [](const Entry& e) {
        return std::max({items_of(e, Shape::kGram, kTile), items_of(e, Shape::kSquare, kTile),
                         items_of(e, Shape::kWide, kTile)});
      },
      [&](const Table& table, unsigned) {
        for (size_t begin = 0; begin < products.size();) {
          const Queue queue = queue_of(table, products, begin, kTile);
          const unsigned blocks = std::min(unsigned(fitting), useful_blocks(queue));
          LAUNCH(kernel, dim3(blocks), dim3(kTile * 2), bytes, stream, table, queue, buffers);
          if (const int error = launched(); error != 0) return error;
          begin += size_t(queue.count);
        }
        return 0;
      });
}

template <int kTile>
int launch_format(const std::vector<Entry>& entries, const std::vector<Product>& products,
                  const Format& x, int square_planes, const ProductBuffers& buffers, void* stream) {
  if (x.planes == 2) return launch<kTile, 2, true, 2>(entries, products, buffers, stream);
  if (square_planes == 2)
    return x.f16 ? launch<kTile, 1, true, 2>(entries, products, buffers, stream)
                 : launch<kTile, 1, false, 2>(entries, products, buffers, stream);
  return x.f16 ? launch<kTile, 1, true, 1>(entries, products, buffers, stream)
               : launch<kTile, 1, false, 1>(entries, products, buffers, stream);
}

}  // namespace

int launch_queue(const std::vector<Entry>& entries, const std::vector<Product>& products,
                 const Format& x, int square_planes, int tile, const ProductBuffers& buffers,
                 void* stream) {
  return tile == 64 ? launch_format<64>(entries, products, x, square_planes, buffers, stream)
                    : launch_format<128>(entries, products, x, square_planes, buffers, stream);
}

}  // namespace spectral_kernels::cuda
