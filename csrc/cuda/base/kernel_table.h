// A list as kernels see it: a table that travels with the launch, so that no copy, no allocation
// and no synchronisation is needed and a captured graph stays valid.
#pragma once

#include <cstddef>
#include <vector>

#include "list_step.h"
#include "ptx.h"

namespace spectral_kernels::cuda {

constexpr int kTableEntries = 48;

// What one launch covers. Blocks first_block[i] .. first_block[i+1]-1 belong to entry i.
template <class E, int kMost = kTableEntries>
struct TableOf {
  int count = 0;
  int64_t first_block[kMost + 1] = {};
  E entries[kMost];
};
using Table = TableOf<Entry>;

// Where a block works.
template <class E>
struct PlaceOf {
  const E* entry;
  int64_t matrix;  // within the entry
  int64_t part;    // of the matrix
};
using Place = PlaceOf<Entry>;

// `parts(entry)` blocks work on each matrix.
template <class E, int kMost, class Parts>
DEVICE PlaceOf<E> place(const TableOf<E, kMost>& table, const int64_t* first_block, int64_t block,
                        Parts parts) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const E& entry = table.entries[low];
  const int64_t own = block - first_block[low], each = parts(entry);
  return {&entry, own / each, own % each};
}

template <class E, int kMost, class Parts>
DEVICE PlaceOf<E> place(const TableOf<E, kMost>& table, int64_t block, Parts parts) {
  return place(table, table.first_block, block, parts);
}

// Launches `go(table, blocks)` until all entries are covered.
template <int kMost = kTableEntries, class E, class Parts, class Go>
int for_each_table(const std::vector<E>& entries, Parts parts, Go go) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  for (size_t begin = 0; begin < entries.size();) {
    TableOf<E, kMost> table;
    static_assert(sizeof(table) < 32000, "kernels take at most 32764 bytes");
    int64_t blocks = 0;
    size_t i = begin;
    for (; i < entries.size() && table.count < kMost; i++) {
      const int64_t own = entries[i].count * parts(entries[i]);
      if (blocks + own > kMostBlocks) break;
      table.first_block[table.count] = blocks;
      table.entries[table.count++] = entries[i];
      blocks += own;
    }
    if (i == begin) return 1;  // cudaErrorInvalidValue: more blocks than a grid can have
    table.first_block[table.count] = blocks;
    begin = i;
    if (blocks == 0) continue;
    const int error = go(table, unsigned(blocks));
    if (error != 0) return error;
  }
  return 0;
}

// The same of counters, a block each.
constexpr int kTableCounters = 64;

struct CounterTable {
  Counter counters[kTableCounters];
};

template <class Go>
int for_each_counter_table(const std::vector<Counter>& counters, Go go) {
  for (size_t begin = 0; begin < counters.size(); begin += kTableCounters) {
    CounterTable table;
    unsigned count = 0;
    for (size_t i = begin; i < counters.size() && count < kTableCounters; i++)
      table.counters[count++] = counters[i];
    if (const int error = go(table, count); error != 0) return error;
  }
  return 0;
}

DEVICE float read(const Matrices& m, int64_t at) {
  switch (m.type) {
    case Type::kBF16:
      return unpack_bf16(static_cast<const uint16_t*>(m.data)[at]).x;
    case Type::kF16:
      return unpack_f16(static_cast<const uint16_t*>(m.data)[at]).x;
    case Type::kF64:
      return float(static_cast<const double*>(m.data)[at]);
    default:
      return static_cast<const float*>(m.data)[at];
  }
}

DEVICE void write(const Matrices& m, int64_t at, float value) {
  switch (m.type) {
    case Type::kBF16:
      static_cast<uint16_t*>(m.data)[at] = uint16_t(pack_bf16(value, 0.f));
      break;
    case Type::kF16:
      static_cast<uint16_t*>(m.data)[at] = uint16_t(pack_f16(value, 0.f));
      break;
    case Type::kF64:
      static_cast<double*>(m.data)[at] = double(value);
      break;
    default:
      static_cast<float*>(m.data)[at] = value;
  }
}

DEVICE float averaged(const Average& by, float y, float x) { return by.old * y + by.fresh * x; }

DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
DEVICE bool finite(uint32_t largest) { return largest < kInfinityBits; }

// Whether a matrix keeps every bit of it and its state.
DEVICE bool kept(uint32_t largest, NonFinite nonfinite) {
  return nonfinite == NonFinite::kSkip ? !finite(largest) : largest == kRefused;
}

// floor(log2 |x|) of a finite, non-zero x given by its bits.
DEVICE int exponent_of(uint32_t bits) {
  const int exponent = int(bits >> 23 & 255);
  return exponent > 0 ? exponent - 127 : -118 - __clz(int(bits & 0x7fffffu));
}

// x 2^exponent in two steps, as a factor alone may overflow. Beyond the limits any sum of packed
// products is 0 or infinite.
struct PowerOfTwo {
  float first, second;
  DEVICE explicit PowerOfTwo(int exponent) {
    exponent = exponent < -252 ? -252 : exponent > 254 ? 254 : exponent;
    first = float_of(uint32_t(exponent / 2 + 127) << 23);
    second = float_of(uint32_t(exponent - exponent / 2 + 127) << 23);
  }
  DEVICE float operator()(float x) const { return x * first * second; }
};

// The largest element of a packed matrix is brought to [2^13, 2^14) in fp16, whose subnormals are
// near, and to [1, 2) in bf16. What is 0 or not finite stays as it is.
constexpr int kTopExponentF16 = 13;
DEVICE int pack_shift(uint32_t largest, bool f16) {
  return finite(largest) && largest != 0 ? (f16 ? kTopExponentF16 : 0) - exponent_of(largest) : 0;
}

// What a matrix is divided by that was packed with this power of two: its norm, at least eps.
DEVICE double divisor_of(double norm, float eps, int shift) {
  const double least = ldexp(double(eps), shift);
  return norm > least ? norm : least;
}
DEVICE float inverse_of(double divisor) { return divisor > 0 ? float(1 / divisor) : 0.f; }

// A bf16 matrix that is read in place needs no scaling between these: its Gram matrix neither
// overflows nor loses to underflow what fp64 could see of its trace. Squares of fp16 always fit.
constexpr int kDirectExponent = 32;
DEVICE bool usual(uint32_t largest, bool f16) {
  if (f16 || largest == 0 || !finite(largest)) return true;
  const int exponent = exponent_of(largest);
  return exponent >= -kDirectExponent && exponent <= kDirectExponent;
}

// The power of two between a matrix and what products read of it.
DEVICE int shift_of(const Entry& e, uint32_t largest, bool f16) {
  return e.packed.direct && usual(largest, f16) ? 0 : pack_shift(largest, f16);
}

}  // namespace spectral_kernels::cuda
