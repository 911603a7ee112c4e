// Inverse roots by a sum of shifted inverses and a few products.
#pragma once

#include "../product.h"

namespace spectral_kernels::cpu {

struct Poles;

// For a spectrum from `low` to 1. Null where there is none: for kinds other than F32, p other than
// 2 and 4, and small matrices, where the products of the coupled iteration are cheaper. (For p = 1
// a factorization alone would do, but where many eigenvalues are at the ridge its error is two to
// three times that of torch.linalg.eigh, and that of the iteration half of it.)
const Poles* poles_for(double low, int p, int64_t n, Kind kind);
int pole_count(const Poles& poles);

// B and B², of which scale B has the spectrum, and room for n x n each.
struct PoleSum {
  static constexpr int kSums = 2;

  Panels b, square;
  double scale = 1;
  Panels sums[kSums], shifted[kSums], w[kSums], wt[kSums];
};

// (scale B)^(-1/p), in one of these; none where a factorization failed.
Panels run(const Poles& poles, const PoleSum& call, int threads);

}  // namespace spectral_kernels::cpu
