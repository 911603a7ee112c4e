#include "lapack_checks.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"
#include "probes.h"

namespace spectral_kernels::cpu {
namespace {

constexpr int64_t kProbes = 4;
using Columns = std::vector<double>;  // kProbes values for every row

double limit(int64_t n) { return 64 * double(n + 8) * std::ldexp(1.0, -53); }

// M X, or Mᵀ X. Four rows of M side by side, whose sums do not wait for one another.
constexpr int64_t kRows = 4;

template <int64_t rows>
void rows_times(int64_t cols, const double* m, const double* x, double* y) {
  double sum[rows][kProbes] = {};
  for (int64_t j = 0; j < cols; j++)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < kProbes; k++) sum[i][k] += m[i * cols + j] * x[j * kProbes + k];
  std::copy_n(&sum[0][0], rows * kProbes, y);
}

// Side by side where this is not one of several matrices on threads of their own.
constexpr int64_t kLines = 64;  // a job
void in_jobs(int64_t lines, int64_t length, const std::function<void(int64_t, int64_t)>& work) {
  const bool small = double(lines) * double(length) * kProbes < 2 * kThreadGrain;
  parallel_jobs(ceil_div(lines, kLines), small ? 1 : available_threads(),
                [&](int64_t job) { work(job * kLines, std::min((job + 1) * kLines, lines)); });
}

Columns times(int64_t rows, int64_t cols, const double* m, const Columns& x) {
  Columns y(size_t(rows * kProbes));
  in_jobs(rows, cols, [&](int64_t i, int64_t end) {
    for (; i + kRows <= end; i += kRows)
      rows_times<kRows>(cols, m + i * cols, x.data(), &y[size_t(i * kProbes)]);
    for (; i < end; i++) rows_times<1>(cols, m + i * cols, x.data(), &y[size_t(i * kProbes)]);
  });
  return y;
}

// Columns [begin, end) of as many rows of M.
template <int64_t rows>
void add_rows_times(int64_t cols, int64_t begin, int64_t end, const double* m, const double* x,
                    double* y) {
  for (int64_t j = begin; j < end; j++)
    for (int64_t k = 0; k < kProbes; k++) {
      double sum = y[j * kProbes + k];
      for (int64_t i = 0; i < rows; i++) sum += m[i * cols + j] * x[i * kProbes + k];
      y[j * kProbes + k] = sum;
    }
}

Columns transposed_times(int64_t rows, int64_t cols, const double* m, const Columns& x) {
  Columns y(size_t(cols * kProbes), 0.0);
  in_jobs(cols, rows, [&](int64_t j, int64_t end) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      add_rows_times<kRows>(cols, j, end, m + i * cols, &x[size_t(i * kProbes)], y.data());
    for (; i < rows; i++)
      add_rows_times<1>(cols, j, end, m + i * cols, &x[size_t(i * kProbes)], y.data());
  });
  return y;
}

Columns scaled_rows(Columns x, const double* by) {
  for (size_t i = 0; i < x.size(); i++) x[i] *= by[i / kProbes];
  return x;
}

double length(const Columns& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return std::sqrt(sum);
}

// NaN where either has one, which no limit accepts.
double distance(Columns x, const Columns& y) {
  for (size_t i = 0; i < x.size(); i++) x[i] -= y[i];
  return length(x);
}

// By a power of two, so that no product overflows; below DBL_MIN rounding is absolute, and `floor`
// is what it can amount to.
struct Scaling {
  double by, norm, floor;
};

Scaling scaling_of(int64_t rows, int64_t cols, const double* a) {
  double largest = 0;
  for (int64_t i = 0; i < rows * cols; i++) largest = std::max(largest, std::abs(a[i]));
  Scaling s{1, 0, 0};
  if (largest > 0) s.by = std::ldexp(1.0, -std::clamp(std::ilogb(largest), -1000, 1000));
  double sum = 0;
  for (int64_t i = 0; i < rows * cols; i++) sum += (a[i] * s.by) * (a[i] * s.by);
  s.norm = std::sqrt(sum);
  s.floor = double(rows + cols) * std::numeric_limits<double>::min() * s.by;
  return s;
}

Columns scaled(Columns x, double by) {
  for (double& value : x) value *= by;
  return x;
}

bool orthonormal_columns(int64_t rows, int64_t cols, const double* q) {
  const Columns y = Probes::signs(cols, kProbes);
  return distance(transposed_times(rows, cols, q, times(rows, cols, q, y)), y) <=
         limit(rows) * length(y);
}

bool orthonormal_rows(int64_t rows, int64_t cols, const double* q) {
  const Columns y = Probes::signs(rows, kProbes);
  return distance(times(rows, cols, q, transposed_times(rows, cols, q, y)), y) <=
         limit(cols) * length(y);
}

Columns product(const Svd& svd, const double* diagonal, const Columns& y) {
  const int64_t k = std::min(svd.m, svd.n);
  return times(svd.m, k, svd.u, scaled_rows(times(k, svd.n, svd.vt, y), diagonal));
}

}  // namespace

bool is_eigendecomposition(int64_t n, const double* a, const double* values, const double* vt) {
  if (n == 0) return true;
  const Scaling s = scaling_of(n, n, a);
  const Columns y = Probes::signs(n, kProbes), vy = transposed_times(n, n, vt, y);
  const Columns left = times(n, n, a, scaled(vy, s.by));
  Columns scaled_values(values, values + n);
  for (double& value : scaled_values) value *= s.by;
  const Columns right = transposed_times(n, n, vt, scaled_rows(y, scaled_values.data()));
  return distance(left, right) <= (limit(n) * s.norm + s.floor) * length(y) &&
         distance(times(n, n, vt, vy), y) <= limit(n) * length(y);
}

bool is_svd(const double* a, const Svd& svd) {
  if (svd.m == 0 || svd.n == 0) return true;
  const int64_t k = std::min(svd.m, svd.n), most = std::max(svd.m, svd.n);
  const Scaling s = scaling_of(svd.m, svd.n, a);
  const Columns y = Probes::signs(svd.n, kProbes);
  Columns diagonal(svd.s, svd.s + k);
  for (double& value : diagonal) value *= s.by;
  const Columns left = times(svd.m, svd.n, a, scaled(y, s.by));
  return distance(left, product(svd, diagonal.data(), y)) <=
             (limit(most) * s.norm + s.floor) * length(y) &&
         orthonormal_columns(svd.m, k, svd.u) && orthonormal_rows(k, svd.n, svd.vt);
}

bool is_polar(const double* b, const Svd& svd, const double* kept) {
  const Columns y = Probes::signs(svd.n, kProbes);
  return distance(times(svd.m, svd.n, b, y), product(svd, kept, y)) <=
         limit(std::max(svd.m, svd.n)) * length(y);
}

}  // namespace spectral_kernels::cpu
