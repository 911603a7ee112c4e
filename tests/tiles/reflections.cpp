// Householder reflections of a panel: H = I - V T Vᵀ is orthogonal, and Hᵀ X upper triangular.
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

void check_reflect(const Kernels& kernels, Kind kind, const std::string& name, const Dense& x) {
  const int64_t P = kernels.panel[int(kind)], m = x.rows, n = x.cols;
  const double u = kind == Kind::kF64 ? 0x1p-53 : 0x1p-24, limit = 20 * u * std::sqrt(double(m));
  Packed packed(kernels, kind, x);
  std::vector<double> t(size_t(P * P), std::nan("")), signs(size_t(n), std::nan(""));
  Reflections work;
  work.x = packed.panels;
  work.t = t.data();
  work.signs = signs.data();
  kernels.reflect[kind == Kind::kF64 ? 1 : 0](work);
  const std::string what =
      name + (kind == Kind::kF64 ? " f64 " : " f32 ") + std::to_string(m) + "x" + std::to_string(n);
  check(packed.padding_is_zero() && packed.margins_are_whole(), what + ": only V is written");
  Dense v(m, n);
  bool trapezoidal = true;
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      v(i, j) = packed(i, j);
      if (i <= j && v(i, j) != (i == j ? 1 : 0)) trapezoidal = false;
    }
  check(trapezoidal, what + ": V is unit lower trapezoidal");
  // H = I - V (T Vᵀ)
  const Dense tv = dense(n, m, [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < n; k++) sum += t[size_t(i * P + k)] * v(j, k);
    return sum;
  });
  const Dense h = dense(m, m, [&](int64_t i, int64_t j) {
    double sum = i == j ? 1 : 0;
    for (int64_t k = 0; k < n; k++) sum -= v(i, k) * tv(k, j);
    return sum;
  });
  compare(what + ": H is orthogonal", product(h, h),
          dense(m, m, [](int64_t i, int64_t j) { return i == j ? 1 : 0; }), limit);
  const Dense r = product(h, x);
  // Columns shorter than this count as zero in the end.
  const double shortest = kind == Kind::kF64 ? 1e-130 : 1e-9;
  double worst = 0;
  bool signed_right = true;
  for (int64_t j = 0; j < n; j++) {
    double length = 0;
    for (int64_t i = 0; i < m; i++) length += x(i, j) * x(i, j);
    length = std::sqrt(length);
    for (int64_t i = j + 1; i < m; i++)
      worst = std::fmax(worst, std::fabs(r(i, j)) / std::fmax(length, shortest));
    if (std::fabs(r(j, j)) > 100 * limit * std::fmax(length, shortest) &&
        signs[size_t(j)] != (r(j, j) < 0 ? -1 : 1))
      signed_right = false;
    if (std::fabs(signs[size_t(j)]) != 1) signed_right = false;
  }
  check(worst <= limit, what + ": below the diagonal of Hᵀ X is " + std::to_string(worst / u) +
                            " u of a column's length");
  check(signed_right, what + ": the signs of the diagonal");
}

}  // namespace

void check_reflections(const Kernels& kernels) {
  for (const Kind kind : {Kind::kF32, Kind::kF64}) {
    const int64_t P = kernels.panel[int(kind)];
    for (const int64_t m : {int64_t(1), int64_t(2), P - 1, P, P + 1, 3 * P + 5, int64_t(301)})
      for (const int64_t n : {int64_t(1), std::min(m, P) / 2, std::min(m, P)}) {
        if (n == 0) continue;
        const Dense x = gaussian(m, n);
        check_reflect(kernels, kind, "gaussian", x);
        check_reflect(kernels, kind, "integers", integers(m, n));
        check_reflect(kernels, kind, "zero", Dense(m, n));
        check_reflect(kernels, kind, "identity",
                      dense(m, n, [](int64_t i, int64_t j) { return i == j ? -1 : 0; }));
        check_reflect(kernels, kind, "one column again and again",
                      dense(m, n, [&](int64_t i, int64_t) { return x(i, 0); }));
        for (const int last : {-40, -80, -600, -1060})
          check_reflect(kernels, kind, "columns down to 2^" + std::to_string(last),
                        dense(m, n, [&](int64_t i, int64_t j) {
                          return std::ldexp(x(i, j), int(last * j / n));
                        }));
      }
  }
}

}  // namespace spectral_kernels::cpu
