// Passes over the elements of matrices of any strides.
#pragma once

#include "../base/kernel_table.h"
#include "moments.h"

namespace spectral_kernels::cuda {

constexpr int kElementThreads = 256;
constexpr int64_t kBlockElements = 4096;

HOST_DEVICE int64_t parts_of(int64_t rows, int64_t columns) {
  return (rows * columns + kBlockElements - 1) / kBlockElements;
}

// go(row, column) for this thread's elements of a block's share, in the order of a memory whose
// rows, or columns, are contiguous.
template <class Go>
DEVICE void each_element(int64_t rows, int64_t columns, bool by_columns, int64_t part, Go go) {
  const int64_t length = by_columns ? rows : columns, all = rows * columns;
  const int64_t end = (part + 1) * kBlockElements < all ? (part + 1) * kBlockElements : all;
  int64_t i = part * kBlockElements + threadIdx.x;
  int64_t slow = i / length, fast = i % length;
  const int64_t slow_step = kElementThreads / length, fast_step = kElementThreads % length;
  for (; i < end; i += kElementThreads) {
    go(by_columns ? fast : slow, by_columns ? slow : fast);
    slow += slow_step;
    fast += fast_step;
    if (fast >= length) {
      fast -= length;
      slow++;
    }
  }
}

DEVICE bool by_columns(const Matrices& m) { return m.row < m.column; }

DEVICE int64_t index(const Matrices& m, int64_t matrix, int64_t row, int64_t column) {
  return matrix * m.batch + row * m.row + column * m.column;
}

DEVICE void write_at(const Matrices& m, int64_t matrix, int64_t row, int64_t column, float value) {
  if (m.data != nullptr) write(m, index(m, matrix, row, column), value);
}

HOST_DEVICE int64_t moment_parts(const MomentEntry& e) { return parts_of(e.rows, e.columns); }

DEVICE float gradient_of(const MomentEntry& e, const Adam& adam, int64_t matrix, int64_t row,
                         int64_t column) {
  const float g = read(e.gradient, index(e.gradient, matrix, row, column));
  return adam.maximize ? -g : g;
}

DEVICE float new_moment(const MomentEntry& e, const Adam& adam, float g, int64_t matrix,
                        int64_t row, int64_t column) {
  const float m = read(e.moment, index(e.moment, matrix, row, column));
  return averaged(adam.first, m, g);
}

}  // namespace spectral_kernels::cuda
