// Inverse roots of ill-conditioned matrices. A sum R of a few shifted inverses, each half a product
// of symmetric matrices and the more of a factorization, has the root to a percent, over six
// decades of the spectrum; then M = R^p B has its spectrum near 1, and a cubic in it does the rest.
// That is some ten products for thirty.
#include "pole_sum.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "../cholesky.h"
#include "../parallel.h"

namespace spectral_kernels::cpu {

// x^(-1/p) as a quadratic and a sum of w / (x + s), for x from 2^-exponent to 1; `error` is the
// relative one.
struct Poles {
  static constexpr int kMost = 4;

  int p, exponent;
  double error;
  std::array<double, kMost> shift, weight;
  std::array<double, 3> quadratic;
};

namespace {

#include "pole_table.inl"  // kTable

// sums[g] = or += w (B + s I)^-1 of the scaled B, as W Wᵀ with W the inverse of a Cholesky factor.
bool add_inverse(const PoleSum& call, int g, double s, double weight, bool first, int threads) {
  Combine shift;
  shift.a = call.b;
  shift.alpha = call.scale;
  shift.gamma = s;
  shift.out = call.shifted[g];
  run(shift, threads);
  if (!cholesky_inverse(call.shifted[g], call.w[g], call.wt[g], threads)) return false;
  Product add;
  add.a = add.b = call.wt[g];
  add.a_t = call.w[g];
  add.a_shape = add.b_shape = Triangle::kLower;
  add.symmetric = true;
  add.alpha = weight;
  add.beta_panels = first ? 0 : 1;
  add.add_panels = add.out = call.sums[g];
  run(add, threads);
  return true;
}

// R into sums[0]. False where a factorization failed.
bool sum_up(const Poles& poles, const PoleSum& call, int threads) {
  constexpr int kSums = PoleSum::kSums;
  const int count = pole_count(poles);
  bool done[kSums] = {true, true};
  // Every second pole goes into a sum of its own, whatever the number of threads.
  const auto every_second = [&](int64_t g, int given) {
    for (int j = int(g); j < count && done[g]; j += kSums)
      done[g] = add_inverse(call, int(g), poles.shift[size_t(j)], poles.weight[size_t(j)],
                            j < kSums, given);
  };
  if (threads <= kSums) {
    parallel_jobs(kSums, threads, [&](int64_t g) { every_second(g, 1); });
  } else {
    for (int g = 0; g < kSums; g++) every_second(g, threads);
  }
  if (!done[0] || !done[1]) return false;
  const Panels& sum = call.sums[0];
  const auto add = [&](const Panels& a, double alpha, double gamma) {
    run(Combine{a, sum, sum, {}, alpha, 1, gamma, 0, {}, {}}, threads);
  };
  const auto [constant, slope, curvature] = poles.quadratic;
  if (slope != 0) add(call.b, slope * call.scale, constant);
  if (curvature != 0) add(call.square, curvature * call.scale * call.scale, 0);
  if (count > 1) add(call.sums[1], 1, 0);
  return true;
}

// y^(-1/p) for y = centre + d with |d| <= half, as a cubic in d: its values at Chebyshev's nodes.
std::array<double, 4> cubic_root(int p, double centre, double half) {
  constexpr double kPi = 3.14159265358979323846;
  double d[4], difference[4];
  for (int i = 0; i < 4; i++) {
    d[i] = half * std::cos((2 * i + 1) * kPi / 8);
    difference[i] = std::pow(centre + d[i], -1.0 / p);
  }
  for (int order = 1; order < 4; order++)
    for (int i = 3; i >= order; i--)
      difference[i] = (difference[i] - difference[i - 1]) / (d[i] - d[i - order]);
  std::array<double, 4> c = {difference[3], 0, 0, 0};  // Horner's scheme on (d - d_i)
  for (int i = 2; i >= 0; i--) {
    for (int k = 3; k > 0; k--) c[size_t(k)] = c[size_t(k - 1)] - d[i] * c[size_t(k)];
    c[0] = difference[i] - d[i] * c[0];
  }
  return c;
}

// D = R^p B - centre I and its transpose into `shifted`. R^p alone would be as large as the
// condition number, and the rounding errors with it; so R multiplies B from both sides in turn. The
// errors of these products grow with the root's own size in their direction. To mirror one triangle
// would carry those of the smallest eigenvalues to the largest ones.
void remaining(const Poles& poles, const PoleSum& call, double centre, int threads) {
  const Panels &r = call.sums[0], &first = call.w[0], &second = call.w[1], &third = call.wt[0];
  Product product = multiply(call.b, call.b, r);
  product.symmetric = true;
  product.alpha = call.scale;
  product.out = first;
  run(product, threads);
  if (poles.p == 4) {
    product = multiply(r, r, first);
    product.out_t = second;
    run(product, threads);
    product = multiply(second, {}, r);
    product.out = third;
    run(product, threads);
  }
  product = multiply(r, r, poles.p == 2 ? first : third);
  product.gamma = -centre;
  product.out = call.shifted[0];
  product.out_t = call.shifted[1];
  run(product, threads);
}

// (c0 + c1 D + c2 D² + c3 D³) R, symmetrised. What D² and D³ add is small, and triangles of it may
// be mirrored.
Panels corrected(const std::array<double, 4>& c, const PoleSum& call, int threads) {
  const Panels &d = call.shifted[0], &d_t = call.shifted[1], &square = call.w[0], &line = call.w[1],
               &rest = call.wt[0], &factor_t = call.w[0], &root = call.sums[1],
               &root_t = call.wt[1];
  Product product = multiply(d_t, d, d);
  product.symmetric = true;
  product.out = square;
  run(product, threads);
  run(Combine{d, {}, line, {}, c[3], 0, c[2], 0, {}, {}}, threads);
  product = multiply(square, square, line);
  product.symmetric = true;
  product.gamma = c[0];
  product.out = rest;
  run(product, threads);
  run(Combine{rest, d_t, factor_t, {}, 1, c[1], 0, 0, {}, {}}, threads);
  product = multiply(factor_t, {}, call.sums[0]);
  product.out = root;
  product.out_t = root_t;
  run(product, threads);
  const Panels& mean = call.w[1];
  run(Combine{root, root_t, mean, {}, 0.5, 0.5, 0, 0, {}, {}}, threads);
  return mean;
}

}  // namespace

int pole_count(const Poles& poles) {
  return int(
      std::count_if(poles.weight.begin(), poles.weight.end(), [](double w) { return w != 0; }));
}

const Poles* poles_for(double low, int p, int64_t n, Kind kind) {
  constexpr int64_t kLeast = 96;
  if (kind != Kind::kF32 || n < kLeast) return nullptr;
  for (const Poles& poles : kTable)
    if (poles.p == p && std::ldexp(1.0, -poles.exponent) <= low) return &poles;
  return nullptr;
}

Panels run(const Poles& poles, const PoleSum& call, int threads) {
  if (!sum_up(poles, call, threads)) return {};
  const double least = std::pow(1 - poles.error, poles.p),
               most = std::pow(1 + poles.error, poles.p);
  // Rounding errors are there too.
  constexpr double kLeastHalf = 0.01;
  const double centre = 0.5 * (least + most);
  const auto c = cubic_root(poles.p, centre, std::max(0.5 * (most - least), kLeastHalf));
  remaining(poles, call, centre, threads);
  return corrected(c, call, threads);
}

}  // namespace spectral_kernels::cpu
