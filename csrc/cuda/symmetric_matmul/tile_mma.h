// A unit of a product by mma.sync: cp.async into swizzled stages, ldmatrix, mma.sync.
#pragma once

#include "epilogue.h"

namespace spectral_kernels::cuda {

template <bool kF16>
DEVICE void multiply(float* d, const uint32_t* a, const uint32_t* b) {
  if (kF16)
    mma_f16(d, a, b);
  else
    mma_bf16(d, a, b);
}

template <int kTile, int kPlanes>
struct Stages {
  static constexpr int kOperand = kPlanes * kTile * kDepth * 2;  // bytes of one operand of a step
  static constexpr int kCount = kTile == 128 && kPlanes == 2 ? 3 : 4;
  static constexpr int kStage = 2 * kOperand, kBytes = kCount * kStage;
  // Stages that C takes once the operands of all steps are on their way: 64 rows in each.
  static constexpr int kOfC = kTile / 64;
  static_assert(kOfC < kCount && kStage == kPlanes * 64 * kTile * 2);
};

// Behind the stages: the word that parts need, and what a block is at, for when its sums are done;
// all through them there are no registers for it.
constexpr int kTurnBytes = 16, kUnitBytes = kTurnBytes + int(sizeof(Unit));
template <int kTile, int kPlanes>
DEVICE Unit& kept_unit(char* shared) {
  return *reinterpret_cast<Unit*>(shared + Stages<kTile, kPlanes>::kBytes + kTurnBytes);
}

// Rows of 64 bytes, or of a tile's width, in pieces of 16 that are permuted, so that the 8 rows of
// an ldmatrix fall into different banks.
DEVICE char* narrow_piece(char* operand, int row, int piece) {
  return operand + row * (kDepth * 2) + ((piece ^ (row >> 1)) & 3) * 16;
}
template <int kTile>
DEVICE char* broad_piece(char* operand, int row, int piece) {
  return operand + row * (kTile * 2) + (piece ^ (row & 7)) * 16;
}

// Copies the operands of a unit to the stages, one step after the other.
template <int kTile, int kPlanes, bool kWideB>
class OperandLoader {
 public:
  using Memory = Stages<kTile, kPlanes>;
  static constexpr int kPlane = kTile * kDepth * 2;

  DEVICE OperandLoader(const Unit& unit, const Product& p, char* shared, int tid)
      : p_(p), shared_(shared) {
    const Entry& e = *unit.at.entry;
    const bool gram = p.shape == Shape::kGram;
    const int64_t row0 = unit.cell.row * kTile, column0 = unit.cell.column * kTile;
    const Offsets o = offsets_of(unit, kPlanes);
    const uint16_t* a = p.a + (gram ? o.of_x : o.of_square);
    const uint16_t* b = p.b + (gram || kWideB ? o.of_x : o.of_square);
    a_line_ = gram ? e.packed.line : o.square;
    a_plane_ = gram ? o.x_plane : o.square_plane;
    b_line_ = kWideB ? e.packed.line : a_line_;
    b_plane_ = kWideB ? o.x_plane : a_plane_;
    same_ = unit.diagonal && a == b;

    const int steps = int(steps_of(e, p.shape)), each = int(over(steps, unit.chunks));
    const int begin = p.alpha == 0 ? steps : unit.chunk * each;
    count_ = (begin + each < steps ? begin + each : steps) - begin;

    const int row = tid / 4, piece = tid % 4;
    const int broad_row = tid / (kTile / 8), broad = tid % (kTile / 8);
    to_a_ = narrow_piece(shared, row, piece);
    to_b_ = Memory::kOperand + (kWideB ? broad_piece<kTile>(shared, broad_row, broad) : to_a_);
    from_a_ = a + (row0 + row) * a_line_ + begin * kDepth + piece * 8;
    from_b_ = kWideB ? b + (begin * kDepth + broad_row) * b_line_ + column0 + broad * 8
                     : b + (column0 + row) * b_line_ + begin * kDepth + piece * 8;
    rows_of_a_ = int(e.rows - row0) - row;
    rows_of_b_ = kWideB ? (column0 + broad * 8 < e.packed.line ? e.rows - broad_row : 0)
                        : int(e.rows - column0) - row;
  }

  // Steps of this unit, and whether both operands are one.
  DEVICE int count() const { return count_; }
  DEVICE bool same() const { return same_; }

  // Starts to copy what `step` reads; behind the last step what becomes of the sums.
  DEVICE void fetch(int step) {
    if (step >= count_) {
      if (p_.c != nullptr && step < count_ + Memory::kOfC) fetch_c(step);
      if (step == count_)
        prefetch_target<kTile, kTile, 2 * kTile, kWideB>(unit(), p_, unit().cell.row * kTile,
                                                         unit().cell.column * kTile, own_thread());
    } else {
      const int stage = step % Memory::kCount * Memory::kStage;
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const bool valid = i * kApart < rows_of_a_;
          copy_async(to_a_ + stage + plane * kPlane + i * kApart * kDepth * 2,
                     valid ? from_a_ + plane * a_plane_ + i * kApart * a_line_ : p_.a, valid);
        }
      if (!same_)
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = i * (kWideB ? kBroadApart : kApart);
            const bool valid = row + (kWideB ? step * kDepth : 0) < rows_of_b_;
            copy_async(to_b_ + stage + plane * kPlane + row * (kWideB ? kTile : kDepth) * 2,
                       valid ? from_b_ + plane * b_plane_ + row * b_line_ : p_.b, valid);
          }
      from_a_ += kDepth;
      from_b_ += kWideB ? kDepth * b_line_ : kDepth;
    }
    copy_async_commit();
  }

  // Two neighbours of C in a row of the unit, the first in an even column.
  DEVICE float2 c(int row, int column) const {
    char* stage = shared_ + (count_ + row / 64) % Memory::kCount * Memory::kStage;
    const char* at = broad_piece<kTile>(stage, row % 64, column / 8) + column % 8 * 2;
    float2 f = pair_of(*reinterpret_cast<const uint32_t*>(at), p_.c_format.f16);
    if (kPlanes == 2 && p_.c_format.planes == 2) {
      const float2 low =
          pair_of(*reinterpret_cast<const uint32_t*>(at + kPlaneOfC), p_.c_format.f16);
      f.x += low.x;
      f.y += low.y;
    }
    return f;
  }

 private:
  static constexpr int kPlaneOfC = 64 * kTile * 2;

  DEVICE const Unit& unit() const { return kept_unit<kTile, kPlanes>(shared_); }

  // 64 rows of C, to where a step's operands would go.
  DEVICE void fetch_c(int step) {
    const Unit& unit = this->unit();
    const Entry& e = *unit.at.entry;
    const Offsets o = offsets_of(unit, kPlanes);
    const int64_t line = kWideB ? e.packed.line : o.square,
                  plane_size = kWideB ? o.x_plane : o.square_plane;
    const int64_t row0 = unit.cell.row * kTile + (step - count_) * 64,
                  column0 = unit.cell.column * kTile;
    const uint16_t* c = p_.c + (kWideB ? o.of_x : o.of_square);
    char* stage = shared_ + step % Memory::kCount * Memory::kStage;
    for (int plane = 0; plane < kPlanes && plane < p_.c_format.planes; plane++)
#pragma unroll 1
      for (int i = own_thread(); i < 64 * kTile / 8; i += 2 * kTile) {
        const int row = i / (kTile / 8), piece = i % (kTile / 8);
        const int64_t column = column0 + piece * 8;
        const bool valid = row0 + row < e.rows && column < line;
        copy_async(broad_piece<kTile>(stage + plane * kPlaneOfC, row, piece),
                   valid ? c + plane * plane_size + (row0 + row) * line + column : p_.c, valid);
      }
  }

  // A thread copies two pieces of each plane, so many rows apart that the permutation is the same.
  static constexpr int kApart = kTile * 2 / 4, kBroadApart = kTile * 2 / (kTile / 8);

  const Product& p_;
  char* shared_;
  char *to_a_, *to_b_;
  const uint16_t *from_a_, *from_b_;
  int64_t a_line_, a_plane_, b_line_, b_plane_;
  int rows_of_a_, rows_of_b_;  // that are left from the thread's first on
  int count_;
  bool same_;
};

// acc += A B of one step, of a warp's kI x kJ tiles of 16 x 8 from (row, column) of the unit on.
template <int kTile, int kPlanes, bool kF16, bool kWideB, int kI, int kJ>
DEVICE void multiply_step(float (&acc)[kI][kJ][4], char* stage_a, char* stage_b, int warp_row,
                          int warp_column, int lane) {
  constexpr int kPlane = kTile * kDepth * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t x[kPlanes][kI][4];
#pragma unroll
    for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
      for (int i = 0; i < kI; i++)
        load_matrix(x[plane][i], narrow_piece(stage_a + plane * kPlane,
                                              warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kJ / 2; j++) {
      uint32_t y[kPlanes][4];
      const int column = warp_column + j * 16;
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++)
        if (kWideB)
          load_matrix_transposed(y[plane],
                                 broad_piece<kTile>(stage_b + plane * kPlane, half * 16 + lane % 16,
                                                    column / 8 + lane / 16));
        else
          load_matrix(y[plane],
                      narrow_piece(stage_b + plane * kPlane, column + lane % 8 + lane / 16 * 8,
                                   half * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* d = acc[i][2 * j + h];
          if (kPlanes == 2) {
            multiply<kF16>(d, x[kPlanes - 1][i], y[0] + 2 * h);
            multiply<kF16>(d, x[0][i], y[kPlanes - 1] + 2 * h);
          }
          multiply<kF16>(d, x[0][i], y[0] + 2 * h);
        }
    }
  }
}

// D, from a thread's sums and C, of a unit whose operands have all been read.
template <int kTile, int kPlanes, bool kWideB, int kI, int kJ, class Loader>
DEVICE void finish_unit(const Unit& unit, const Product& p, const ProductBuffers& buffers,
                        const Loader& loader, Sums<kI, kJ>& sum, char* shared) {
  constexpr int kThreads = kTile * 2, kSize = kTile * kTile, kAcross = kTile / 32;
  const int tid = own_thread(), lane = tid % 32, warp = tid / 32;
  int* turn = reinterpret_cast<int*>(shared + Stages<kTile, kPlanes>::kBytes);
  const int row = warp / kAcross * (kTile / 2) + lane / 4,
            column = warp % kAcross * 32 + lane % 4 * 2;
  if (unit.chunks > 1) {
    const Entry& e = *unit.at.entry;
    const int64_t tile = e.product.tile + unit.at.matrix * tiles_of(e, p.shape, kTile) + unit.tile;
    if (!add_parts<kThreads, kSize / kThreads>(buffers.parts + tile * kMostChunks * kSize,
                                               buffers.arrived + tile, unit.chunk, unit.chunks,
                                               &sum[0][0][0], turn, tid, 0))
      return;
  }
  const Factors by = factors_of(unit, p);
  if (p.c != nullptr) {
    add_c(sum, by,
          [&](int i, int j, int h) { return loader.c(row + i * 16 + h * 8, column + j * 8); });
    __syncthreads();
  } else {
    scale(sum, by.alpha);
  }
  if (!kWideB && unit.diagonal && p.d != nullptr && p.gamma != 0)
    add_to_diagonal(sum, row - column, p.gamma);
  stage<kTile>(sum, shared, row, column);
  __syncthreads();

  const bool mirrored = !kWideB && !unit.diagonal && (p.d == nullptr || !p.d_format.lower);
  const Panel<kTile, kTile, kThreads> panel{
      shared, unit.cell.row * kTile, unit.cell.column * kTile, tid, 0, unit.diagonal, mirrored};
  if (!kWideB && unit.diagonal) {
    mirror_lower(panel);
    __syncthreads();
  }
  if (p.d != nullptr) {
    store_in_workspace<kWideB>(unit, p, kPlanes, panel);
    return;
  }
  Delivery how = delivery_of<kWideB>(unit, p, buffers);
  if (how.kept) return;
  if (!kWideB && p.update.add) {
    add_old(unit, how.unshifted, panel);
    how.unshifted = PowerOfTwo(0);
    __syncthreads();
  }
  const uint32_t lost = store_in_target<kWideB>(how, panel);
  if (lost != 0) atomicMax(buffers.largest + unit.matrix, lost);
}

// D, or a part of its sum, of one unit by the kTile * 2 threads of a block. `shared` has room for
// the stages and kUnitBytes behind them. kFull: the sums have fp32 accuracy.
template <int kTile, int kPlanes, bool kF16, bool kWideB, bool kFull = kPlanes == 2>
DEVICE void multiply_unit(const Unit& given, const Product& p, const ProductBuffers& buffers,
                          char* shared) {
  using Memory = Stages<kTile, kPlanes>;
  constexpr int kAcross = kTile / 32;     // warps: 2 x kAcross
  constexpr int kI = kTile / 32, kJ = 4;  // a warp's tiles of 16 x 8
  constexpr int kPromoted = 2;            // steps between additions to the sum in full precision
  const int tid = own_thread(), lane = tid % 32, warp = tid / 32;
  if (kWideB && idle(given, p)) return;
  if (tid == 0) kept_unit<kTile, kPlanes>(shared) = given;
  OperandLoader<kTile, kPlanes, kWideB> loader(given, p, shared, tid);
  __syncthreads();
  const int count = loader.count();
  const int warp_row = warp / kAcross * (kTile / 2), warp_column = warp % kAcross * 32;
  float acc[kI][kJ][4] = {}, total[kFull ? kI : 1][kJ][4] = {};
  // The first steps only fetch: what that takes stands in one place.
#pragma unroll 1
  for (int step = 1 - Memory::kCount; step < count; step++) {
    if (step >= 0) {
      copy_async_wait<Memory::kCount - 2>();
      __syncthreads();
    }
    loader.fetch(step + Memory::kCount - 1);
    if (step < 0) continue;
    char* stage_a = shared + step % Memory::kCount * Memory::kStage;
    char* stage_b = loader.same() ? stage_a : stage_a + Memory::kOperand;
    multiply_step<kTile, kPlanes, kF16, kWideB>(acc, stage_a, stage_b, warp_row, warp_column, lane);
    // Tensor cores truncate; their sums stay short where fp32 accuracy is promised.
    if (kFull && (step % kPromoted == kPromoted - 1 || step + 1 == count))
#pragma unroll
      for (int i = 0; i < kI; i++)
#pragma unroll
        for (int j = 0; j < kJ; j++)
#pragma unroll
          for (int k = 0; k < 4; k++) {
            total[kFull ? i : 0][j][k] += acc[i][j][k];
            acc[i][j][k] = 0;
          }
  }
  copy_async_wait<0>();
  __syncthreads();
  auto& sum = kFull ? reinterpret_cast<float (&)[kI][kJ][4]>(total) : acc;
  finish_unit<kTile, kPlanes, kWideB>(kept_unit<kTile, kPlanes>(shared), p, buffers, loader, sum,
                                      shared);
}

}  // namespace spectral_kernels::cuda
