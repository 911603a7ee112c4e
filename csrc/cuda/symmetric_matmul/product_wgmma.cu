// Grouped products by wgmma: a persistent block of one loading and two multiplying warpgroups. Of
// symmetric intermediates only the lower triangle is stored; a block above the diagonal is its
// mirror image, read through transposed descriptors, which cost 16-bit types nothing.
#ifndef CUDA_EMULATION
#include <cuda.h>
#endif

#include <algorithm>
#include <type_traits>

#include "../base/launch.h"
#include "product.h"
#include "ptx_sm90.h"
#include "stream_k.h"
#include "tile.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kTile = 128, kStep = 64;  // of wgmma: 64 columns are a swizzled line of 128 bytes
constexpr int kBox = 64 * 64 * 2;       // bytes that one TMA brings
constexpr int kOperand = 2 * kBox, kStage = 2 * kOperand, kStages = 4;
constexpr int kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kStaged = kStages * kStage, kBarriers = kStaged + kTile * kTile * 4;
constexpr int kBytes = kBarriers + 2 * kStages * 8 + 16 + 1024;

struct Maps {
  CUtensorMap a[kTableEntries], b[kTableEntries];
};

HOST_DEVICE Cut cut_of(const Entry& e, Shape shape) {
  const int64_t steps = steps_of(e, shape) * kDepth / kStep;
  const int64_t length = shape == Shape::kGram     ? e.product.stretch
                         : shape == Shape::kSquare ? e.product.square_stretch
                                                   : steps;
  return {tiles_of(e, shape, kTile), steps, length};
}

// Calls go(unit, begin, end) for what a block does as its number `item`. A step loads 128 rows of A
// and 128 rows of B, or B's columns in A X.
template <class Go>
DEVICE void for_each_unit(const Table& table, int64_t item, const Product& p, Go go) {
  const Place at =
      place(table, item, [&](const Entry& e) { return cut_of(e, p.shape).stretches(); });
  for_each_piece(cut_of(*at.entry, p.shape), at.part, [&](const Piece& piece) {
    go(unit_of(at, piece.tile, piece.part, piece.parts, p.shape, kTile), piece.begin, piece.end);
  });
}

// Where the columns of a tile's rows leave the stored triangle, in steps; `end` if they never do.
DEVICE int above(const Product& p, int64_t tile, int end) {
  const bool lower = p.shape == Shape::kSquare && p.format.lower;
  const int64_t first = (tile + 1) * (kTile / kStep);
  return lower && first < end ? int(first) : end;
}

// Swizzled lines of 128 bytes. Rows are K-major: groups of 8 lines are 1024 bytes apart. Columns
// are MN-major: so are groups of 8 in K, and 64 columns further is the next box.
DEVICE uint64_t descriptor(const char* shared, bool columns) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  const uint64_t leading = columns ? kBox / 16 : 1, stride = 1024 / 16;
  return kSwizzle128 | stride << 32 | leading << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

template <bool kF16, int kColumnsA, int kColumnsB>
DEVICE void multiply_step(float* acc, const char* a, const char* b) {
  uint64_t of_a = descriptor(a, kColumnsA), of_b = descriptor(b, kColumnsB);
  constexpr uint64_t kNextA = (kColumnsA ? 16 * 128 : 32) / 16,
                     kNextB = (kColumnsB ? 16 * 128 : 32) / 16;
#pragma unroll
  for (int k = 0; k < kStep / 16; k++) {
    wgmma<kF16, kColumnsA, kColumnsB>(acc, of_a, of_b);
    of_a += kNextA;
    of_b += kNextB;
  }
}

template <bool kF16, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    product_wgmma_kernel(const __grid_constant__ Table table, const __grid_constant__ Maps maps,
                         const Product p, const ProductBuffers buffers, int64_t items) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  DYNAMIC_SHARED(char, unaligned);
  char* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kBarriers);
  uint64_t* empty = full + kStages;
  int* turn = reinterpret_cast<int*>(empty + kStages);
  const int tid = threadIdx.x, warpgroup = tid / 128;
  if (tid == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, kConsumers / 32);  // each warp for itself: warps drift apart
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warpgroup == kConsumers / 128) {
    leave_registers<40>();
    if (tid != kConsumers) return;
    const auto load_unit = [&](const Unit& u, int begin, int end) {
      if (kWide && idle(u, p)) return;
      const int number = int(u.at.entry - table.entries), z = int(u.at.matrix);
      const int row = int(u.cell.row) * kTile, column = int(u.cell.column) * kTile;
      const bool same = u.diagonal && p.a == p.b;
      const int above_row = above(p, u.cell.row, end), above_column = above(p, u.cell.column, end);
      for (int step = begin; step < end; step++) {
        mbarrier_wait(empty + stage, phase ^ 1);
        mbarrier_expect(full + stage, same ? kOperand : kStage);
        char* to = shared + stage * kStage;
        const int k = step * kStep;
        const auto load = [&](char* operand, const CUtensorMap* map, int first, bool columns) {
          for (int i = 0; i < 2; i++)
            if (columns)
              tma_load(operand + i * kBox, map, full + stage, first + i * 64, k, z);
            else
              tma_load(operand + i * kBox, map, full + stage, k, first + i * 64, z);
        };
        load(to, maps.a + number, row, step >= above_row);
        if (!same) load(to + kOperand, maps.b + number, column, kWide || step >= above_column);
        advance();
      }
    };
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x)
      for_each_unit(table, item, p, load_unit);
    return;
  }

  take_registers<232>();
  const int warp = tid / 32, lane = tid % 32;
  const auto multiply_unit = [&](const Unit& u, int begin, int end) {
    if (kWide && idle(u, p)) return;
    const bool same = u.diagonal && p.a == p.b;
    float acc[64] = {};
    // Steps up to `to` whose operands are all read one way: with a branch between them, ptxas would
    // wait for every single wgmma.
    int at = begin;
    const auto multiply_up_to = [&](int to, auto columns_a, auto columns_b) {
      int before = -1;  // the stage that the previous step still reads
#pragma unroll 1
      for (; at < to; at++) {
        mbarrier_wait(full + stage, phase);
        const char* operand = shared + stage * kStage;
        const char *a = operand + warpgroup * kBox, *b = same ? operand : operand + kOperand;
        wgmma_fence();
        multiply_step<kF16, columns_a, columns_b>(acc, a, b);
        wgmma_commit();
        wgmma_wait<1>();
        if (before >= 0 && lane == 0) mbarrier_arrive(empty + before);
        before = stage;
        advance();
      }
      wgmma_wait<0>();
      if (before >= 0 && lane == 0) mbarrier_arrive(empty + before);
    };
    constexpr std::integral_constant<int, 0> kRows;
    constexpr std::integral_constant<int, 1> kColumns;
    if constexpr (kWide) {
      multiply_up_to(end, kRows, kColumns);
    } else {
      // The row's tile is not left of the column's, so its triangle ends later.
      multiply_up_to(above(p, u.cell.column, end), kRows, kRows);
      multiply_up_to(above(p, u.cell.row, end), kRows, kColumns);
      multiply_up_to(end, kColumns, kColumns);
    }

    char* result = shared + kStaged;
    BARRIER(kConsumers);  // the last tile has left
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        staged<kTile>(result, warp * 16 + lane / 4 + i / 2 * 8, j * 8 + lane % 4 * 2 + i % 2) =
            acc[4 * j + i];
    BARRIER(kConsumers);
    finish_tile<kTile, kConsumers, kWide>(u, p, buffers, result, turn, tid);
  };
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x)
    for_each_unit(table, item, p, multiply_unit);
#else
  __trap();  // without the "a" there is no wgmma, and an empty kernel would leave what was there
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, which this library does not link.
Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

bool encode(Encode function, CUtensorMap* map, bool f16, const uint16_t* base, int64_t line,
            int64_t rows, int64_t count, int64_t apart) {
  const cuuint64_t sizes[3] = {cuuint64_t(line), cuuint64_t(rows), cuuint64_t(count)};
  const cuuint64_t strides[2] = {cuuint64_t(line * 2), cuuint64_t(apart * 2)};
  const cuuint32_t box[3] = {64, 64, 1}, steps[3] = {1, 1, 1};
  return function(map, f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                  const_cast<uint16_t*>(base), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool kF16, bool kWide>
int launch(const std::vector<Entry>& entries, const Product& p, const ProductBuffers& buffers,
           int multiprocessors, void* stream) {
  constexpr auto kernel = product_wgmma_kernel<kF16, kWide>;
  if (const int error = allow_shared<kernel>(kBytes); error != 0) return error;
  static const Encode function = encoder();
  if (function == nullptr) return int(cudaErrorNotSupported);
  return for_each_table(
      entries, [&](const Entry& e) { return cut_of(e, p.shape).stretches(); },
      [&](const Table& table, unsigned items) {
        Maps maps;
        bool good = true;
        for (int i = 0; i < table.count && good; i++) {
          const Entry& e = table.entries[i];
          const int64_t square = square_line(e);
          const auto of_x = [&](CUtensorMap* map, const uint16_t* x) {
            return encode(function, map, kF16, x + e.packed.plane, e.packed.line, e.rows, e.count,
                          e.rows * e.packed.line);
          };
          const auto of_square = [&](CUtensorMap* map, const uint16_t* x) {
            return encode(function, map, kF16, x + e.square, square, e.rows, e.count,
                          e.rows * square * 2);
          };
          const bool gram = p.shape == Shape::kGram;
          good = gram ? of_x(maps.a + i, p.a) : of_square(maps.a + i, p.a);
          good = good && (gram || kWide ? of_x(maps.b + i, p.b) : of_square(maps.b + i, p.b));
        }
        if (!good) return int(cudaErrorInvalidValue);
        const unsigned blocks = std::min(items, unsigned(multiprocessors));
        LAUNCH(kernel, dim3(blocks), dim3(kThreads), kBytes, stream, table, maps, p, buffers,
               int64_t(items));
        return launched();
      });
}

}  // namespace

int launch_product_wgmma(const std::vector<Entry>& entries, const Product& product,
                         const ProductBuffers& buffers, int multiprocessors, void* stream) {
  const bool f16 = product.format.f16, wide = product.shape == Shape::kWide;
  if (product.format.planes != 1) return int(cudaErrorInvalidValue);
  if (wide)
    return f16 ? launch<true, true>(entries, product, buffers, multiprocessors, stream)
               : launch<false, true>(entries, product, buffers, multiprocessors, stream);
  return f16 ? launch<true, false>(entries, product, buffers, multiprocessors, stream)
             : launch<false, false>(entries, product, buffers, multiprocessors, stream);
}

}  // namespace spectral_kernels::cuda
