// A unit of a product by mma.sync: cp.async into swizzled stages, ldmatrix, mma.sync.
#pragma once

#include "tile.h"

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
  static constexpr int kBytes = kCount * 2 * kOperand;
};

// D, or a part of its sum, of one unit by the kTile * 2 threads of a block. `shared` has room for
// the stages and a word behind them. kFull: the sums have fp32 accuracy.
template <int kTile, int kPlanes, bool kF16, bool kWideB, bool kFull = kPlanes == 2>
DEVICE void multiply_unit(const Unit& unit, const Product& p, const ProductBuffers& buffers,
                          char* shared) {
  using Memory = Stages<kTile, kPlanes>;
  constexpr int kThreads = kTile * 2, kAcross = kTile / 32;  // warps: 2 x kAcross
  constexpr int kI = kTile / 32, kJ = 4;                     // a warp's tiles of 16 x 8
  constexpr int kPromoted = 2;  // steps between additions to the sum in full precision
  constexpr int kPlane = kTile * kDepth * 2;
  const int tid = own_thread(), lane = tid % 32, warp = tid / 32;
  const Entry& e = *unit.at.entry;
  const bool diagonal = unit.diagonal, gram = p.shape == Shape::kGram;
  const int64_t row0 = unit.cell.row * kTile, column0 = unit.cell.column * kTile;
  const Offsets o = offsets_of(unit, kPlanes);
  const int64_t square = o.square, square_plane = o.square_plane, x_plane = o.x_plane;
  const uint16_t* a = p.a + (gram ? o.of_x : o.of_square);
  const uint16_t* b = p.b + (gram || kWideB ? o.of_x : o.of_square);
  const int64_t a_line = gram ? e.line : square, a_plane = gram ? x_plane : square_plane;
  const int64_t b_line = kWideB ? e.line : a_line, b_plane = kWideB ? x_plane : a_plane;
  const bool same = diagonal && a == b;

  const int steps = int(steps_of(e, p.shape)), each = int(over(steps, unit.chunks));
  const int begin = p.alpha == 0 ? steps : unit.chunk * each;
  const int count = (begin + each < steps ? begin + each : steps) - begin;

  // Rows of 64 bytes, or of a tile's width, in pieces of 16 that are permuted, so that the 8 rows
  // of an ldmatrix fall into different banks.
  const auto narrow = [&](char* operand, int row, int piece) {
    return operand + row * (kDepth * 2) + ((piece ^ (row >> 1)) & 3) * 16;
  };
  const auto broad = [&](char* operand, int row, int piece) {
    return operand + row * (kTile * 2) + (piece ^ (row & 7)) * 16;
  };
  // A thread copies two pieces of each plane, so many rows apart that the permutation is the same.
  constexpr int kApart = kThreads / 4, kBroadApart = kThreads / (kTile / 8);
  const int own_row = tid / 4, own_piece = tid % 4;
  const int broad_row = tid / (kTile / 8), broad_piece = tid % (kTile / 8);
  char* const to_a = narrow(shared, own_row, own_piece);
  char* const to_b = Memory::kOperand + (kWideB ? broad(shared, broad_row, broad_piece) : to_a);
  const uint16_t* from_a = a + (row0 + own_row) * a_line + begin * kDepth + own_piece * 8;
  const uint16_t* from_b =
      kWideB ? b + (begin * kDepth + broad_row) * b_line + column0 + broad_piece * 8
             : b + (column0 + own_row) * b_line + begin * kDepth + own_piece * 8;
  const int rows_of_a = int(e.rows - row0) - own_row;  // that are left from the thread's first on
  const int rows_of_b = kWideB ? (column0 + broad_piece * 8 < e.line ? e.rows - broad_row : 0)
                               : int(e.rows - column0) - own_row;
  const auto fetch = [&](int step) {
    if (step < count) {
      const int stage = step % Memory::kCount * (2 * Memory::kOperand);
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const bool valid = i * kApart < rows_of_a;
          copy_async(to_a + stage + plane * kPlane + i * kApart * kDepth * 2,
                     valid ? from_a + plane * a_plane + i * kApart * a_line : p.a, valid);
        }
      if (!same)
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = i * (kWideB ? kBroadApart : kApart);
            const bool valid = row + (kWideB ? step * kDepth : 0) < rows_of_b;
            copy_async(to_b + stage + plane * kPlane + row * (kWideB ? kTile : kDepth) * 2,
                       valid ? from_b + plane * b_plane + row * b_line : p.b, valid);
          }
      from_a += kDepth;
      from_b += kWideB ? kDepth * b_line : kDepth;
    }
    copy_async_commit();
  };

  const int warp_row = warp / kAcross * (kTile / 2), warp_column = warp % kAcross * 32;
  float acc[kI][kJ][4] = {}, total[kFull ? kI : 1][kJ][4] = {};
  for (int i = 0; i < Memory::kCount - 1; i++) fetch(i);
  for (int step = 0; step < count; step++) {
    copy_async_wait<Memory::kCount - 2>();
    __syncthreads();
    fetch(step + Memory::kCount - 1);
    char* stage_a = shared + step % Memory::kCount * (2 * Memory::kOperand);
    char* stage_b = same ? stage_a : stage_a + Memory::kOperand;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t x[kPlanes][kI][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++)
#pragma unroll
        for (int i = 0; i < kI; i++)
          load_matrix(x[plane][i], narrow(stage_a + plane * kPlane, warp_row + i * 16 + lane % 16,
                                          half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kJ / 2; j++) {
        uint32_t y[kPlanes][4];
        const int column = warp_column + j * 16;
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++)
          if (kWideB)
            load_matrix_transposed(y[plane], broad(stage_b + plane * kPlane, half * 16 + lane % 16,
                                                   column / 8 + lane / 16));
          else
            load_matrix(y[plane],
                        narrow(stage_b + plane * kPlane, column + lane % 8 + lane / 16 * 8,
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

#pragma unroll
  for (int i = 0; i < kI; i++)
#pragma unroll
    for (int j = 0; j < kJ; j++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        staged<kTile>(shared, warp_row + i * 16 + lane / 4 + k / 2 * 8,
                      warp_column + j * 8 + lane % 4 * 2 + k % 2) = sum[i][j][k];
  __syncthreads();

  finish_tile<kTile, kThreads, kWideB>(unit, p, buffers, shared,
                                       reinterpret_cast<int*>(shared + Memory::kBytes), tid);
}

}  // namespace spectral_kernels::cuda
