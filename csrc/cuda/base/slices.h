// Lists that are worked on in parts, so that workspaces stay small.
#pragma once

#include <algorithm>
#include <vector>

#include "matrix_list.h"

namespace spectral_kernels::cuda {

// To matrix number `index`.
inline void advance(Matrices& m, int64_t index) {
  const int64_t size = m.type == Type::kF64 ? 8 : m.type == Type::kF32 ? 4 : 2;
  if (m.data != nullptr) m.data = static_cast<char*>(m.data) + index * m.batch * size;
}

inline Entry part_of(Entry entry, int64_t index, int64_t count) {
  for (Matrices* m : {&entry.source, &entry.momentum, &entry.target}) advance(*m, index);
  entry.first += index;
  entry.count = count;
  return entry;
}

// Calls `go` with consecutive parts of a list whose workspaces, bytes(item) a matrix, are limited
// to `most`. Items need a count, and part_of(item, index, count).
template <class Item, class Bytes, class Go>
void in_slices(const std::vector<Item>& items, int64_t most, Bytes bytes, Go go) {
  std::vector<Item> slice;
  int64_t used = 0;
  for (const Item& item : items)
    for (int64_t at = 0; at < item.count;) {
      const int64_t each = bytes(item), fitting = (most - used) / each;
      if (fitting <= 0 && !slice.empty()) {
        go(slice);
        slice.clear();
        used = 0;
        continue;
      }
      const int64_t count = std::min(item.count - at, std::max<int64_t>(fitting, 1));
      slice.push_back(part_of(item, at, count));
      used += count * each;
      at += count;
    }
  if (!slice.empty()) go(slice);
}

}  // namespace spectral_kernels::cuda
