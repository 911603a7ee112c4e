#include "secular.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../tiles.h"

namespace spectral_kernels::cpu {
namespace {

struct Value {
  double low, low_slope;    // of the poles at and below the zero
  double high, high_slope;  // of those above it
  double inverse;           // 1 / rho

  double sum() const { return inverse + low + high; }
  // What rounding may make of a sum of zero.
  double noise() const {
    return 8 * std::numeric_limits<double>::epsilon() *
           (std::abs(inverse) + std::abs(low) + std::abs(high));
  }
};

}  // namespace

// The poles on either side are replaced by one each, at the nearest and with the value and slope of
// the sum of them; the zero of that is the next guess. A guess that leaves the interval in which
// the zero is known to lie is replaced by the middle of it. Gu, Eisenstat, SIAM J. Matrix Anal.
// Appl. 15, 1266 (1994); Li, LAPACK working note 89.
SecularRoot secular_root(int64_t i, int64_t k, const double* d, const double* z2, double rho) {
  constexpr int kMost = 200;
  const auto sums = kernels().secular_sums;
  const bool last = i == k - 1;
  // Of the last zero, which has no pole above it, the nearest pole counts as that one.
  const int64_t left = last ? k - 2 : i, right = left + 1;
  SecularRoot root{i, 0};
  const auto value_at = [&](double mu) {
    Value v{0, 0, 0, 0, 1 / rho};
    sums(d, z2, 0, right, d[root.origin], mu, &v.low, &v.low_slope);
    sums(d, z2, right, k, d[root.origin], mu, &v.high, &v.high_slope);
    return v;
  };
  double low = 0, high;
  if (last) {
    high = 0;
    for (int64_t j = 0; j < k; j++) high += z2[j];
    high *= rho;
    root.mu = high / 2;
    high *= 1 + 4 * double(k) * std::numeric_limits<double>::epsilon();
  } else {
    root.mu = high = (d[i + 1] - d[i]) / 2;
  }
  Value v = value_at(root.mu);
  if (!last && v.sum() < 0) {  // nearer to the pole above
    root = {i + 1, -root.mu};
    low = root.mu;
    high = 0;
    v = value_at(root.mu);
  }
  for (int step = 0; step < kMost; step++) {
    const double f = v.sum();
    if (std::abs(f) <= v.noise()) break;
    (f < 0 ? low : high) = root.mu;
    const double d1 = (d[left] - d[root.origin]) - root.mu,
                 d2 = (d[right] - d[root.origin]) - root.mu;
    const double c = f - d1 * v.low_slope - d2 * v.high_slope,
                 a = (d1 + d2) * f - d1 * d2 * (v.low_slope + v.high_slope), b = d1 * d2 * f;
    const double square = std::sqrt(std::max(a * a - 4 * b * c, 0.0));
    double change;
    if (last)
      change = a >= 0 ? (a + square) / (2 * c) : 2 * b / (a - square);
    else
      change = a <= 0 ? (a - square) / (2 * c) : 2 * b / (a + square);
    double next = root.mu + change;
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    if (next == root.mu || !(next > low && next < high)) break;  // no number is between them
    root.mu = next;
    v = value_at(next);
  }
  return root;
}

}  // namespace spectral_kernels::cpu
