// Eight columns of fixed signs, packed: on them an n x n matrix shows its length at the price of a
// few of its own columns.
#pragma once

#include "product.h"

namespace spectral_kernels::cpu {

struct Probes {
  static constexpr int64_t kCount = 8;

  Probes(int64_t n, Kind kind);
  // `count` signs for each of n rows, in the order of the rows (see sign_matrix in the reference).
  static std::vector<double> signs(int64_t n, int64_t count = kCount);

  static size_t bytes(int64_t n, Kind kind) { return 4 * panel_bytes(n, kCount, kind); }

  Workspace workspace;
  Panels columns, weighted, image, next;  // the signs, and room for three products of them
};

}  // namespace spectral_kernels::cpu
