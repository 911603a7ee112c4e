// What an eigendecomposition does outside products, beside plain loops. Small integers: every sum
// is exact, so that results must match whatever the order.
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kUntouched = -77;

void check_symmetric_times(const Kernels& kernels, int64_t n) {
  const int64_t P = kernels.panel[int(Kind::kF64)], panels = ceil_div(n, P);
  const Dense half = integers(n, n);
  const Dense a = dense(n, n, [&](int64_t i, int64_t j) { return half(i, j) + half(j, i); });
  // Above the blocks on the diagonal nothing may be read.
  Packed packed(kernels, Kind::kF64, dense(n, n, [&](int64_t i, int64_t j) {
                  return j / P > i / P ? std::nan("") : a(i, j);
                }));
  const Dense x = integers(panels * P, 1);
  for (const int64_t cut : {int64_t(0), panels / 2, panels}) {
    std::vector<double> from(size_t(panels * P), 0.0), y(size_t(panels * P + 8), 0.0);
    for (int64_t i = 0; i < n; i++) from[size_t(i)] = x(i, 0);
    for (int64_t i = panels * P; i < panels * P + 8; i++) y[size_t(i)] = kUntouched;
    kernels.symmetric_times(packed.panels, from.data(), 0, cut, y.data());
    kernels.symmetric_times(packed.panels, from.data(), cut, panels, y.data());
    bool right = true;
    for (int64_t i = 0; i < n; i++) {
      double sum = 0;
      for (int64_t j = 0; j < n; j++) sum += a(i, j) * from[size_t(j)];
      right = right && y[size_t(i)] == sum;
    }
    for (int64_t i = panels * P; i < panels * P + 8; i++)
      right = right && y[size_t(i)] == kUntouched;
    check(right, "symmetric matrix times a vector, " + std::to_string(n) + ", in two parts at " +
                     std::to_string(cut));
  }
}

void check_lines(const Kernels& kernels, int64_t lines, int64_t count) {
  const int64_t pitch = count + 5;
  const Dense x = integers(std::max<int64_t>(lines, 1), pitch), by = integers(lines + 1, 1),
              given = integers(1, pitch);
  const std::string what = std::to_string(lines) + " lines of " + std::to_string(count);
  for (const int64_t begin : {int64_t(0), int64_t(3)}) {
    if (begin > count) continue;
    std::vector<double> y(given.values);
    kernels.add_lines(lines, x.values.data(), pitch, by.values.data(), begin, count, y.data());
    bool right = true;
    for (int64_t i = 0; i < pitch; i++) {
      double sum = given(0, i);
      for (int64_t k = 0; k < lines && i >= begin && i < count; k++) sum += by(k, 0) * x(k, i);
      right = right && y[size_t(i)] == sum;
    }
    check(right, what + " added");
    std::vector<double> dots(size_t(lines + 1), kUntouched);
    kernels.dot_lines(lines, x.values.data(), pitch, given.values.data(), begin, count,
                      dots.data());
    right = dots[size_t(lines)] == kUntouched;
    for (int64_t k = 0; k < lines; k++) {
      double sum = 0;
      for (int64_t i = begin; i < count; i++) sum += x(k, i) * given(0, i);
      right = right && dots[size_t(k)] == sum;
    }
    check(right, what + " times a vector");
  }
}

void check_secular_sums(const Kernels& kernels, int64_t count) {
  const Dense d = gaussian(1, count + 2), z = gaussian(1, count + 2);
  const double origin = 10, mu = 0.25;  // outside all of d
  long double value = 0, slope = 0, size = 0;
  for (int64_t j = 1; j < count + 1; j++) {
    const long double inverse = 1 / ((long double)(d(0, j)) - origin - mu),
                      term = (long double)(z(0, j)) * z(0, j) * inverse;
    value += term;
    slope += term * inverse;
    size += std::fabs(double(term));
  }
  std::vector<double> z2(z.values);
  for (double& each : z2) each *= each;
  double found = std::nan(""), found_slope = std::nan("");
  kernels.secular_sums(d.values.data(), z2.data(), 1, count + 1, origin, mu, &found, &found_slope);
  const double limit = 0x1p-53 * double(count + 4) * double(size);
  check(
      std::fabs(found - double(value)) <= limit && std::fabs(found_slope - double(slope)) <= limit,
      "secular sums of " + std::to_string(count));
}

}  // namespace

void check_eigen(const Kernels& kernels) {
  const int64_t P = kernels.panel[int(Kind::kF64)];
  for (const int64_t n : {int64_t(1), int64_t(2), P - 1, P, P + 1, 2 * P + 3, 5 * P, 5 * P + 7})
    check_symmetric_times(kernels, n);
  for (const int64_t lines : {0, 1, 2, 5, 24})
    for (const int64_t count : {0, 1, 3, 4, 15, 16, 31, 32, 33, 70})
      check_lines(kernels, lines, count);
  for (const int64_t count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 50}) check_secular_sums(kernels, count);
}

}  // namespace spectral_kernels::cpu
