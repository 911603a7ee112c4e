// Grouped products by wgmma: persistent clusters of two blocks, each of one loading and two
// multiplying warpgroups. A cluster makes 256 x 256 of a result, a block 128 x 256; both read the
// same columns, of which each loads one half for both. Symmetric results are stored whole, the
// mirror image of a box by a transposed store: a triangle would be read in three loops of its own,
// for whose sums ptxas has no registers.
//
// While a tile leaves through TMA, box by box, the next one is on its way to the ring of stages.
#ifndef CUDA_EMULATION
#include <cuda.h>
#endif

#include <algorithm>

#include "../base/launch.h"
#include "epilogue.h"
#include "product.h"
#include "ptx_sm90.h"
#include "stream_k.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kSide = kWgmmaTile, kRows = kSide / 2;  // of a cluster; rows of a block
constexpr int kStep = 64;                             // 64 columns are a swizzled line of 128 bytes
constexpr int kBox = 64 * 64 * 2;                     // bytes that one TMA brings or takes
constexpr int kOfB = kRows / 64 * kBox, kStage = kOfB + kSide / 64 * kBox, kStages = 4;
constexpr int kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kSums = 64 * kSide / 128;  // that a thread has
// Behind the stages: two boxes of results for each warpgroup, which also hold 64 x 64 floats.
constexpr int kResults = kStages * kStage, kOfGroup = 2 * kBox;
constexpr int kBarriers = kResults + 2 * kOfGroup;
constexpr int kUnits = kBarriers + 2 * kStages * 8 + 16;  // what each warpgroup is at
constexpr int kBytes = kUnits + 2 * int(sizeof(Unit)) + 1024;
static_assert(kBytes <= 227 * 1024);

// Entries of a launch: their maps travel with it.
constexpr int kEntries = 16;
using Table16 = TableOf<Entry, kEntries>;
struct Maps {
  CUtensorMap a[kEntries], b[kEntries], c[kEntries], d[kEntries];
};
static_assert(sizeof(Table16) + sizeof(Maps) + sizeof(Product) + sizeof(ProductBuffers) <= 16384);

HOST_DEVICE Cut cut_of(const Entry& e, Shape shape) {
  const int64_t steps = steps_of(e, shape) * kDepth / kStep;
  const int64_t length = shape == Shape::kGram     ? e.product.stretch
                         : shape == Shape::kSquare ? e.product.square_stretch
                                                   : steps;
  return {tiles_of(e, shape, kSide), steps, length};
}

// The tiles of a result, column by column in strips of some rows, so that clusters at work share
// rows and columns.
DEVICE Cell cell_in_strips(const Entry& e, Shape shape, int64_t t) {
  constexpr int64_t kStrip = 8;
  const bool wide = shape == Shape::kWide;
  const int64_t down = over(wide ? e.rows : square_line(e), kSide),
                across = over(e.packed.line, kSide);
  const int64_t row = wide ? t / (kStrip * across) * kStrip : cell_of(e, shape, kSide, t).row;
  const int64_t first = row / kStrip * kStrip;
  const int64_t height = down - first < kStrip ? down - first : kStrip;
  int64_t own = t - (wide ? first * across : first * (first + 1) / 2);
  if (wide || own < (first + 1) * height) return {first + own % height, own / height};
  own -= (first + 1) * height;
  int64_t column = first + 1;
  for (; own >= first + height - column; column++) own -= first + height - column;
  return {column + own, column};
}

// Calls go(unit, begin, end) for what a cluster does as its number `item`, steps begin .. end-1 of
// a unit.
template <class Go>
DEVICE void for_each_unit(const Table16& table, int64_t item, const Product& p, Go go) {
  const Place at = place(table, table.first_block, item,
                         [&](const Entry& e) { return cut_of(e, p.shape).stretches(); });
  for_each_piece(cut_of(*at.entry, p.shape), at.part, [&](const Piece& piece) {
    Unit u = unit_of(at, piece.tile, piece.part, piece.parts, p.shape, kSide);
    u.cell = cell_in_strips(*at.entry, p.shape, piece.tile);
    u.diagonal = p.shape != Shape::kWide && u.cell.row == u.cell.column;
    go(u, piece.begin, piece.end);
  });
}

// The stages, in turn. A stage is full when its bytes are there, and empty when all multiplying
// warps of the cluster have left it: what is loaded goes to both blocks.
struct Ring {
  char* shared;
  uint64_t *full, *empty;
  int stage = 0;
  uint32_t phase = 0;

  DEVICE explicit Ring(char* memory)
      : shared(memory),
        full(reinterpret_cast<uint64_t*>(memory + kBarriers)),
        empty(full + kStages) {}
  DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // For the loading thread: the next stage, for so many bytes.
  DEVICE char* fill(int bytes) {
    mbarrier_wait(empty + stage, phase ^ 1);
    mbarrier_expect(full + stage, bytes);
    return shared + stage * kStage;
  }
  // For the multiplying warps: waits for the next stage, and leaves one.
  DEVICE const char* take() {
    mbarrier_wait(full + stage, phase);
    return shared + stage * kStage;
  }
  DEVICE void leave(int which, int lane) {
    if (lane < 2) mbarrier_arrive_at(empty + which, lane);
  }
};

// What both blocks of a cluster know of a unit.
struct Where {
  int rank, number;  // of the block, of the entry
};

template <bool kWide>
DEVICE void load_unit(Ring& ring, const Maps& maps, const Unit& u, const Product& p, Where where,
                      int begin, int end) {
  const int z = int(u.at.matrix), row = int(u.cell.row) * kSide + where.rank * kRows,
            column = int(u.cell.column) * kSide;
  const bool same = u.diagonal && p.a == p.b;
#pragma unroll 1
  for (int step = begin; step < end; step++) {
    char* to = ring.fill(same ? kStage - kOfB : kStage);
    uint64_t* full = ring.full + ring.stage;
    const int k = step * kStep;
    for (int i = 0; i < kRows / 64 && !same; i++)
      tma_load(to + i * kBox, maps.a + where.number, full, k, row + i * 64, z);
    for (int i = where.rank * 2; i < where.rank * 2 + 2; i++) {
      const int first = column + i * 64;
      tma_load_both(to + kOfB + i * kBox, maps.b + where.number, full, kWide ? first : k,
                    kWide ? k : first, z);
    }
    ring.advance();
  }
  // C takes the next two stages, 128 columns each.
#pragma unroll 1
  for (int half = 0; half < 2 && p.c != nullptr; half++) {
    char* to = ring.fill(4 * kBox);
    for (int i = 0; i < 4; i++)
      tma_load(to + i * kBox, maps.c + where.number, ring.full + ring.stage,
               column + half * 128 + i % 2 * 64, row + i / 2 * 64, z);
    ring.advance();
  }
}

// Swizzled lines of 128 bytes. Rows are K-major: groups of 8 lines are 1024 bytes apart. Columns
// are MN-major: so are groups of 8 in K, and 64 columns further is the next box.
DEVICE uint64_t descriptor(const char* shared, bool columns) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  const uint64_t leading = columns ? kBox / 16 : 1, stride = 1024 / 16;
  return kSwizzle128 | stride << 32 | leading << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

// B is read in rows, or X in columns.
template <bool kF16, int kColumnsB>
DEVICE void multiply_step(float* acc, const char* a, const char* b) {
  uint64_t of_a = descriptor(a, false), of_b = descriptor(b, kColumnsB);
#pragma unroll
  for (int k = 0; k < kStep / 16; k++) {
    wgmma<kF16, 0, kColumnsB>(acc, of_a, of_b);
    of_a += 32 / 16;
    of_b += (kColumnsB ? 16 * 128 : 32) / 16;
  }
}

template <bool kF16, bool kWide>
DEVICE void multiply(Ring& ring, const Unit& u, const Product& p, int rank, int begin, int end,
                     float* acc) {
  const int lane = own_thread() % 32, warpgroup = own_thread() / 128;
  // On the diagonal the rows are some of the columns.
  const int of_a =
      u.diagonal && p.a == p.b ? kOfB + (rank * 2 + warpgroup) * kBox : warpgroup * kBox;
  int before = -1;  // the stage that the previous step still reads
  fence_sums<kSums>(acc);
#pragma unroll 1
  for (int at = begin; at < end; at++) {
    const char* operands = ring.take();
    wgmma_fence();
    multiply_step<kF16, kWide>(acc, operands + of_a, operands + kOfB);
    wgmma_commit();
    wgmma_wait<1>();
    fence_sums<kSums>(acc);
    if (before >= 0) ring.leave(before, lane);
    before = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  fence_sums<kSums>(acc);
  ring.leave(before, lane);
}

// Where an element of a box is.
DEVICE char* in_box(char* box, int row, int column) {
  return box + row * 128 + ((column >> 3 ^ row) & 7) * 16 + (column & 7) * 2;
}

// alpha sum + beta C, from the two stages of C, which a block that has only left a part leaves too.
DEVICE void take_c(Ring& ring, Sums<1, kSums / 4>& sum, const Product& p, Factors by, bool last) {
  const int lane = own_thread() % 32, warp = own_thread() / 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    char* boxes = const_cast<char*>(ring.take()) + warp / 4 * 2 * kBox;
    if (last)
      add_c(reinterpret_cast<Sums<1, 16>&>(sum[0][half * 16]), by, [&](int, int j, int h) {
        const char* at = in_box(boxes + j / 8 * kBox, warp % 4 * 16 + lane / 4 + h * 8,
                                j % 8 * 8 + lane % 4 * 2);
        return pair_of(*reinterpret_cast<const uint32_t*>(at), p.c_format.f16);
      });
    __syncwarp();  // all lanes have read
    ring.leave(ring.stage, lane);
    ring.advance();
  }
}

// go(sums of 64 columns), by a number that registers do not take.
template <class Go>
DEVICE void with_columns(Sums<1, kSums / 4>& sum, int which, Go go) {
  static_assert(kSide == 256);
  if (which == 0) go(reinterpret_cast<Sums<1, 8>&>(sum[0][0]));
  if (which == 1) go(reinterpret_cast<Sums<1, 8>&>(sum[0][8]));
  if (which == 2) go(reinterpret_cast<Sums<1, 8>&>(sum[0][16]));
  if (which == 3) go(reinterpret_cast<Sums<1, 8>&>(sum[0][24]));
}

// What a warpgroup does with one box of a result, or its mirror image, by TMA.
struct Sender {
  const CUtensorMap* map;
  char* boxes;  // two, one of which may still be on its way
  int z, group, tid;
  bool f16;
  int sent = 0;  // so far

  DEVICE void send(Sums<1, kSums / 4>& sum, int which, int x, int y, bool diagonal,
                   bool transposed) {
    char* box = boxes + sent++ % 2 * kBox;
    if (tid == 0) tma_store_wait<1>();
    BARRIER(group, 128);
    with_columns(sum, which, [&](Sums<1, 8>& own) {
      if (diagonal)
        write_diagonal(box, own);
      else
        write(box, own, transposed);
    });
    fence_for_tma();
    BARRIER(group, 128);
    if (tid != 0) return;
    tma_store(map, box, x, y, z);
    tma_store_commit();
  }

 private:
  // Both mirror images of an element are one number: the lower one.
  DEVICE void write_diagonal(char* box, Sums<1, 8>& sum) const {
    const int lane = own_thread() % 32, warp = own_thread() % 128 / 32;
    for_each_pair<1, 8>([&](int i, int j, int h, int down, int right) {
      const int row = warp * 16 + lane / 4 + down, column = lane % 4 * 2 + right;
      const uint32_t pair = packed_pair(sum[i][j][2 * h], sum[i][j][2 * h + 1], f16);
#pragma unroll
      for (int k = 0; k < 2; k++)
        if (row >= column + k)
          *reinterpret_cast<uint16_t*>(in_box(box, row, column + k)) =
              *reinterpret_cast<uint16_t*>(in_box(box, column + k, row)) = uint16_t(pair >> 16 * k);
    });
  }
  DEVICE void write(char* box, Sums<1, 8>& sum, bool transposed) const {
    const int lane = own_thread() % 32, warp = own_thread() % 128 / 32;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const float* pair = sum[0][j + m / 2] + m % 2 * 2;
        words[m] = packed_pair(pair[0], pair[1], f16);
      }
      const int line = lane % 8, along = j + lane / 16, down = warp * 2 + lane / 8 % 2;
      if (transposed)
        store_matrix_transposed(in_box(box, along * 8 + line, down * 8), words);
      else
        store_matrix(in_box(box, down * 8 + line, along * 8), words);
    }
  }
};

// What becomes of a warpgroup's 64 rows, 64 columns at a time: those above the diagonal are left
// out, and those below it have a mirror image.
template <bool kWide>
DEVICE void store_rows(const Unit& u, const Product& p, const ProductBuffers& buffers,
                       Sums<1, kSums / 4>& sum, int64_t row, Sender& sender) {
  const Entry& e = *u.at.entry;
  const int64_t columns = kWide ? e.packed.line : square_line(e);
  const bool to_target = p.d == nullptr;
  Delivery how{e.target, u.at.matrix, e.rows, e.rows};
  if (to_target) how = delivery_of<kWide>(u, p, buffers);
  if (how.kept || row >= e.rows) return;
  uint32_t lost = 0;
#pragma unroll 1
  for (int which = 0; which < kSide / 64; which++) {
    const int64_t column = u.cell.column * kSide + which * 64;
    if (column >= columns || (!kWide && column > row)) break;
    const bool diagonal = !kWide && column == row;
    if (!to_target) {
      const bool mirrored = !kWide && !diagonal;
#pragma unroll 1
      for (int image = 0; image < 1 + mirrored; image++)
        sender.send(sum, which, int(image == 0 ? column : row), int(image == 0 ? row : column),
                    diagonal, image == 1);
      continue;
    }
    const Panel<64, 64, 128> panel{
        sender.boxes, row, column, own_thread() % 128, sender.group, diagonal, !kWide && !diagonal};
    BARRIER(sender.group, 128);
    with_columns(sum, which, [&](Sums<1, 8>& own) {
      const int lane = own_thread() % 32, warp = own_thread() % 128 / 32;
      stage<64>(own, sender.boxes, warp * 16 + lane / 4, lane % 4 * 2);
    });
    BARRIER(sender.group, 128);
    if (diagonal) {
      mirror_lower(panel);
      BARRIER(sender.group, 128);
    }
    lost = larger(lost, store_in_target<kWide>(how, panel));
  }
  if (lost != 0) atomicMax(buffers.largest + u.matrix, lost);
}

template <bool kF16, bool kWide>
DEVICE void multiply_unit(Ring& ring, const Unit& u, const Product& p,
                          const ProductBuffers& buffers, int rank, int begin, int end,
                          Sender& sender, int* turn) {
  const int tid = own_thread(), lane = tid % 32;
  const int64_t row = u.cell.row * kSide + rank * kRows + tid / 128 * 64;
  prefetch_target<64, kSide, 128, kWide>(u, p, row, u.cell.column * kSide, tid % 128);
  Sums<1, kSums / 4> sum = {};
  multiply<kF16, kWide>(ring, u, p, rank, begin, end, &sum[0][0][0]);
  bool last = true;
  if (u.chunks > 1) {
    const Entry& e = *u.at.entry;
    const int64_t part =
        2 * (e.product.tile + u.at.matrix * tiles_of(e, p.shape, kSide) + u.tile) + rank;
    last = add_parts<kConsumers, kSums>(buffers.parts + part * kMostChunks * kRows * kSide,
                                        buffers.arrived + part, u.chunk, u.chunks, &sum[0][0][0],
                                        turn, tid, 0);
  }
  const Factors by = factors_of(u, p);
  if (p.c != nullptr)
    take_c(ring, sum, p, by, last);
  else
    scale(sum, by.alpha);
  if (!last) return;
  if (!kWide && u.diagonal && p.d != nullptr && p.gamma != 0)
    add_to_diagonal(sum,
                    int(row - u.cell.column * kSide) + tid / 32 % 4 * 16 + lane / 4 - lane % 4 * 2,
                    p.gamma);
  store_rows<kWide>(u, p, buffers, sum, row, sender);
}

// Processors before sm_90 know no clusters; what they compile is a trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define OF_TWO_BLOCKS
#else
#define OF_TWO_BLOCKS __cluster_dims__(2, 1, 1)
#endif

template <bool kF16, bool kWide>
__global__ void OF_TWO_BLOCKS __launch_bounds__(kThreads, 1)
    product_wgmma_kernel(const __grid_constant__ Table16 table, const __grid_constant__ Maps maps,
                         const __grid_constant__ Product p, const ProductBuffers buffers,
                         int64_t items) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  DYNAMIC_SHARED(char, unaligned);
  char* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  Ring ring(shared);
  int* turn = reinterpret_cast<int*>(ring.empty + kStages);
  const int tid = threadIdx.x, rank = cluster_rank();
  const int warpgroup = __shfl_sync(~0u, tid / 128, 0);  // the compiler sees that warps agree
  const int64_t first = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (tid == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(ring.full + i, 1);
      // Each warp of both blocks for itself: warps drift apart.
      mbarrier_init(ring.empty + i, 2 * kConsumers / 32);
    }
    mbarrier_init_fence();
    prefetch_map(maps.a);
    prefetch_map(maps.b);
    if (p.c != nullptr) prefetch_map(maps.c);
    if (p.d != nullptr) prefetch_map(maps.d);
  }
  // Barriers are there before the other block arrives at them.
  CLUSTER_BARRIER();
  let_next_begin();
  wait_for_previous();

  if (warpgroup == kConsumers / 128) {
    leave_registers<56>();
    const auto load = [&](const Unit& u, int begin, int end) {
      if (kWide && idle(u, p)) return;
      load_unit<kWide>(ring, maps, u, p, {rank, int(u.at.entry - table.entries)}, begin, end);
    };
    if (tid == kConsumers)
      for (int64_t item = first; item < items; item += clusters)
        for_each_unit(table, item, p, load);
  } else {
    take_registers<224>();
    Sender sender{maps.d,    shared + kResults + warpgroup * kOfGroup,
                  0,         1 + warpgroup,
                  tid % 128, p.d_format.f16};
    const auto multiply = [&](const Unit& u, int begin, int end) {
      if (kWide && idle(u, p)) return;
      sender.map = maps.d + (u.at.entry - table.entries);
      sender.z = int(u.at.matrix);
      // There are no registers for it while products are at work.
      Unit& kept = reinterpret_cast<Unit*>(shared + kUnits)[warpgroup];
      BARRIER(sender.group, 128);
      if (sender.tid == 0) kept = u;
      BARRIER(sender.group, 128);
      multiply_unit<kF16, kWide>(ring, kept, p, buffers, rank, begin, end, sender, turn);
    };
    for (int64_t item = first; item < items; item += clusters)
      for_each_unit(table, item, p, multiply);
    if (sender.tid == 0) tma_store_wait<0>();
  }
  // Nobody ends while the other block may still arrive at its barriers.
  CLUSTER_BARRIER();
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
  return for_each_table<kEntries>(
      entries, [&](const Entry& e) { return cut_of(e, p.shape).stretches(); },
      [&](const Table16& table, unsigned items) {
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
          const auto of_result = [&](CUtensorMap* map, const uint16_t* x) {
            return x == nullptr || (kWide ? of_x(map, x) : of_square(map, x));
          };
          good = (gram ? of_x(maps.a + i, p.a) : of_square(maps.a + i, p.a)) &&
                 (gram || kWide ? of_x(maps.b + i, p.b) : of_square(maps.b + i, p.b)) &&
                 of_result(maps.c + i, p.c) && of_result(maps.d + i, p.d);
        }
        if (!good) return int(cudaErrorInvalidValue);
        const unsigned clusters = std::min(items, unsigned(std::max(multiprocessors / 2, 1)));
        return LAUNCH_CLUSTERS(kernel, dim3(2 * clusters), dim3(kThreads), kBytes, stream, table,
                               maps, p, buffers, int64_t(items));
      });
}

}  // namespace

int launch_product_wgmma(const std::vector<Entry>& entries, const Product& product,
                         const ProductBuffers& buffers, int multiprocessors, void* stream) {
  const bool f16 = product.format.f16, wide = product.shape == Shape::kWide;
  if (product.format.lower || product.update.add || product.format.planes != 1 ||
      (product.c != nullptr && product.c_format.planes != 1) ||
      (product.d != nullptr && product.d_format.planes != 1))
    return int(cudaErrorInvalidValue);
  if (wide)
    return f16 ? launch<true, true>(entries, product, buffers, multiprocessors, stream)
               : launch<false, true>(entries, product, buffers, multiprocessors, stream);
  return f16 ? launch<true, false>(entries, product, buffers, multiprocessors, stream)
             : launch<false, false>(entries, product, buffers, multiprocessors, stream);
}

}  // namespace spectral_kernels::cuda
