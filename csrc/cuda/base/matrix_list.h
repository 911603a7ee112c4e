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

// Where the packed copies of an entry are, which every product reads.
struct PackedPlace {
  int64_t plane = 0;    // element of the workspace, of the first matrix
  int64_t line = 0;     // numbers of one row
  int64_t norm = 0;     // number of the first matrix's first partial norm
  bool direct = false;  // products read the 16-bit source in place: nothing is packed
};

// Where an iteration on chip keeps what belongs to an entry: elements of its workspaces, of the
// first matrix.
struct OnChipPlace {
  int64_t part = 0;  // sums of the Gram matrix
  int64_t q = 0;     // Q
};

// How products of an entry are cut into tiles and sums.
struct ProductPlace {
  int64_t tile = 0;       // number of the first matrix's first tile
  int chunks = 1;         // parts of a sum over columns
  int square_chunks = 1;  // parts of a sum over rows
  int64_t stretch = 0;    // the same for wgmma, see stream_k.h
  int64_t square_stretch = 0;
};

// `count` matrices of one shape, oriented so that rows <= columns, with what belongs to each, and
// their places in the workspaces of the stages that they go through.
struct Entry {
  Matrices source;    // gradient, or the input of a function
  Matrices momentum;  // data is null where there is none
  Matrices target;    // parameter, or the result of a function
  int64_t columns = 0, count = 0;
  int64_t first = 0;   // number of its first matrix in the whole list
  int64_t square = 0;  // element of the workspaces for matrices of rows x rows, of the first matrix
  int rows = 0;
  float scale = 1;  // of the update
  float keep = 0;   // share of the old matrix, where a result is added to one
  PackedPlace packed;
  OnChipPlace chip;
  ProductPlace product;
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
    e.packed.line = packed_line(e.columns);
    e.packed.plane = packed;
    packed += e.count * e.rows * e.packed.line * planes;
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
