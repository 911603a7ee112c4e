// Lists of matrices of mixed shapes, dtypes and strides, as the launch functions take them.
#pragma once

#include <cstdint>
#include <vector>

namespace spectral_kernels::cuda {

enum class Type : int { kF32, kBF16, kF16, kF64 };

// A batch of matrices in device memory; strides in elements.
struct Matrices {
  void* data = nullptr;
  Type type = Type::kF32;
  int64_t row = 0, column = 0, batch = 0;
};

// `count` matrices of one shape, oriented so that rows <= columns, with what belongs to each.
struct Entry {
  Matrices source;    // gradient, or the input of a function
  Matrices momentum;  // data is null where there is none
  Matrices target;    // parameter, or the result of a function
  int64_t columns = 0, count = 0;
  int64_t first = 0;      // number of its first matrix in the whole list
  int64_t plane = 0;      // of its first matrix: element of the workspace for packed matrices
  int64_t line = 0;       // packed columns of one row
  int64_t part = 0;       // element of the workspace for sums of its first matrix
  int64_t q = 0;          // and of that for Q
  int64_t square = 0;     // and of those for matrices of rows x rows
  int64_t tile = 0;       // number of its first matrix's first tile
  int64_t norm = 0;       // and of its first partial norm
  int chunks = 1;         // parts that sums over columns are made in
  int square_chunks = 1;  // and those over rows
  int64_t stretch = 0;    // the same for wgmma, see stream_k.h
  int64_t square_stretch = 0;
  int rows = 0;
  float scale = 1;      // of the update
  float keep = 0;       // share of the old matrix, where a result is added to one
  bool direct = false;  // products read the 16-bit source in place: nothing is packed
};

constexpr int kPackedColumns = 64;  // packed rows are padded to a multiple of this

// Numbers that a packed row of so many columns takes, at least one step's.
inline int64_t packed_line(int64_t columns) {
  return ((columns < 1 ? 1 : columns) + kPackedColumns - 1) / kPackedColumns * kPackedColumns;
}

// Places packed matrices one after the other, row by row; returns the elements of the workspace.
inline int64_t place_packed(std::vector<Entry>& entries, int planes) {
  int64_t packed = 0;
  for (Entry& e : entries) {
    e.line = packed_line(e.columns);
    e.plane = packed;
    packed += e.count * e.rows * e.line * planes;
  }
  return packed;
}

// Weights of y <- beta y + (1 - beta) x. 1 - beta is computed in double: computed from the float
// nearest to beta, near 1, its relative error would be some ten times that of a float.
struct Average {
  float old = 0, fresh = 1;
  Average() = default;
  explicit Average(double beta) : old(float(beta)), fresh(float(1 - beta)) {}
};

// The largest |element| of a matrix, as the bits of a float, which order as the numbers do.
constexpr uint32_t kInfinityBits = 0x7f800000u;
// Stored instead of the largest |element| of a matrix that is always skipped, also with
// NonFinite::kPropagate.
constexpr uint32_t kRefused = 0xffffffffu;

}  // namespace spectral_kernels::cuda
