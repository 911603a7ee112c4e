// Eigenbases: by LAPACK in fp64, and their refresh by QR of packed matrices.
// reference/eigenbasis.py is the specification.
#include "basis.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../cholesky.h"
#include "../eigen/eigen.h"
#include "../householder.h"
#include "../parallel.h"
#include "../probes.h"
#include "../views.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class Refresher {
 public:
  static constexpr int kPanels = 7;

  Refresher(const Matrix& q, const Matrix& a, int threads)
      : kind_(a.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32),
        u_(std::ldexp(1.0, kind_ == Kind::kF64 ? -53 : -24)),
        n_(a.rows),
        threads_(threads),
        q_(q),
        workspace_(kPanels * panel_bytes(n_, n_, kind_)) {
    for (Panels& panels : pool_) panels = take_panels(workspace_, n_, n_, kind_);
  }

  Refresh run_on(const Matrix& a, bool sort, const Matrix& q_new) {
    Refresh result;
    result.order.resize(size_t(n_));
    std::iota(result.order.begin(), result.order.end(), 0);
    const double largest = max_abs(a, threads_);
    if (largest == 0) {
      result.values.assign(size_t(n_), 0.0);
      if (q_new.data != q_.data) copy_scaled(q_, 0, q_new);
      return result;
    }
    const int exponent = exponent_of(largest);
    Panels p = pool_[0], pt = pool_[1];
    const Panels sym = pool_[2], q = pool_[3];
    pack_symmetric(a, -exponent, sym, pool_[4], pool_[5]);
    Pack pack;
    pack.x = q_;
    pack.out = q;
    run(pack, threads_);
    Product first = multiply(sym, q);
    first.a_t = sym;
    first.out = p;
    first.out_t = pt;
    run(first, threads_);
    result.values = column_sums(ColumnSum::kDot, q, p, threads_);
    keep_null_directions(q, p, pt, result.values);
    std::vector<int64_t>& order = result.order;
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return result.values[size_t(i)] > result.values[size_t(j)];
    });
    if (!std::is_sorted(order.begin(), order.end())) {
      permute_rows(pt, order, pool_[2]);
      pt = pool_[2];
      Combine transpose;
      transpose.a = pt;
      transpose.out_t = p;
      run(transpose, threads_);
    }
    for (double& value : result.values) value = std::ldexp(value, exponent);
    std::vector<Panels> free;
    for (const Panels& panels : pool_)
      if (panels.data != p.data && panels.data != pt.data) free.push_back(panels);
    if (!orthonormalize(p, pt, free)) {
      if (q_new.data != q_.data) copy_scaled(q_, 0, q_new);
      return result;
    }
    write(pt, sort, order, q_new, free[0]);
    return result;
  }

 private:
  void pack_symmetric(const Matrix& a, int shift, const Panels& out, const Panels& t1,
                      const Panels& t2) {
    Pack pack;
    pack.x = a;
    pack.shift = shift;
    pack.out = t1;
    pack.out_t = t2;
    run(pack, threads_);
    Combine mean;
    mean.a = t1;
    mean.b = t2;
    mean.alpha = mean.beta = 0.5;
    mean.out = out;
    run(mean, threads_);
  }

  void permute_rows(const Panels& from, const std::vector<int64_t>& order, const Panels& to) {
    const int64_t P = kernels().panel[int(kind_)], row = P * (kind_ == Kind::kF64 ? 8 : 4);
    parallel_jobs(ceil_div(n_, P), threads_, [&](int64_t j) {
      for (int64_t i = 0; i < n_; i++)
        std::copy_n(static_cast<const char*>(part(from, order[size_t(i)], 1, j * P, 1).data), row,
                    static_cast<char*>(part(to, i, 1, j * P, 1).data));
    });
  }

  // Unit columns, so that no square under- or overflows. A column that is rounding noise of A is
  // replaced by its old direction, with the value 0.
  void keep_null_directions(const Panels& q, const Panels& p, const Panels& pt,
                            std::vector<double>& values) {
    std::vector<double> inverse = column_sums(ColumnSum::kDot, p, p, threads_);
    const double longest = std::sqrt(*std::max_element(inverse.begin(), inverse.end()));
    const double noise = u_ * std::sqrt(double(n_)) * longest;
    for (int64_t j = 0; j < n_; j++) {
      double& value = inverse[size_t(j)];
      value = std::sqrt(value) > noise ? 1 / std::sqrt(value) : 0;
      if (value > 0) continue;
      values[size_t(j)] = 0;
      value = 1;
      for (int64_t i = 0; i < n_; i++) {
        const double old = element(q, i, j);
        set_element(p, i, j, old);
        set_element(pt, j, i, old);
      }
    }
    scale_columns(p, pt, inverse.data(), threads_);
  }

  // P <- its orthonormal factor: by CholeskyQR where the columns, which are of length 1, are near
  // to that, by Householder reflections, which take the time of two such passes, where they are
  // not. False for a P that is not finite.
  bool orthonormalize(Panels& p, Panels& pt, std::vector<Panels>& free) {
    constexpr double kNear = 0.5;
    // Householder QR in the same precision leaves 7 to 13 u sqrt(n).
    const double enough = 10 * u_ * std::sqrt(double(n_)), most = 10 * enough;
    if (probed_error(p, pt) < kNear && correct(p, pt, free, kNear, enough)) return true;
    orthonormal_factor(p, pt, free.data(), threads_);
    return probed_error(p, pt) < most;
  }

  // P <- P W until its columns are orthonormal. False, with P as it was or nearer, where they are
  // not near to that.
  bool correct(Panels& p, Panels& pt, std::vector<Panels>& free, double near, double enough) {
    const bool wide = kind_ == Kind::kF64;
    const double first_order = wide ? 1e-7 : 0.03, last = wide ? 1e-7 : 2e-3;
    constexpr int kMostPasses = 4;
    for (int pass = 0; pass < kMostPasses; pass++) {
      const Panels c = free[0], w = free[1], wt = free[2], next = free[3], next_t = free[4];
      Product gram = multiply(p, p);
      gram.a_t = pt;
      gram.symmetric = true;
      gram.out = c;
      run(gram, threads_);
      std::vector<double> inverse_norm(size_t(n_), 0.0), minus_one(size_t(n_), -1.0);
      for (int64_t j = 0; j < n_; j++) inverse_norm[size_t(j)] = 1 / std::sqrt(element(c, j, j));
      Scale unit;  // C - I
      unit.x = unit.out = c;
      unit.row = unit.col = inverse_norm.data();
      unit.diagonal = minus_one.data();
      run(unit, threads_);
      const double error = std::sqrt(sum_of_squares(c, threads_));
      if (!(error < near)) return false;
      Scale factor;
      factor.out = w;
      if (error < first_order) {  // D (I - striu(C))
        std::vector<double> minus_norm(inverse_norm);
        for (double& value : minus_norm) value = -value;
        factor.x = c;
        factor.row = minus_norm.data();
        factor.strict_upper = true;
        factor.diagonal = inverse_norm.data();
        run(factor, threads_);
      } else {
        if (!invert_factor(c, w, wt)) return false;
        factor.x = w;
        factor.row = inverse_norm.data();
        run(factor, threads_);
      }
      Product apply = multiply(pt, w);
      apply.a_t = p;
      apply.b_shape = Triangle::kUpper;
      apply.out = next;
      apply.out_t = next_t;
      run(apply, threads_);
      std::swap(p, free[3]);
      std::swap(pt, free[4]);
      if (error < last || probed_error(p, pt) < enough) return true;
    }
    return false;
  }

  // ||PᵀP - I||_F, as its product with random signs shows it.
  double probed_error(const Panels& p, const Panels& pt) {
    Probes probes(n_, kind_);
    Product first = multiply(pt, probes.columns), second = multiply(p, probes.image);
    first.out = probes.image;
    second.out = probes.next;
    run(first, threads_);
    run(second, threads_);
    Combine difference;
    difference.a = difference.out = probes.next;
    difference.alpha = 1;
    difference.b = probes.columns;
    difference.beta = -1;
    run(difference, 1);
    return std::sqrt(sum_of_squares(probes.next, 1) / double(Probes::kCount));
  }

  // W = R⁻¹, Rᵀ R = C, from C - I.
  bool invert_factor(const Panels& c, const Panels& w, const Panels& wt) {
    Workspace workspace(panel_bytes(n_, n_, kind_));
    const Panels whole = take_panels(workspace, n_, n_, kind_);
    Combine add;
    add.a = c;
    add.gamma = 1;
    add.out = whole;
    run(add, threads_);
    return cholesky_inverse(whole, w, wt, threads_);
  }

  // Column k of the new basis goes where column order[k] of the old one was, unless sorted.
  void write(const Panels& pt, bool sort, const std::vector<int64_t>& order, const Matrix& out,
             const Panels& scratch) {
    Panels rows = pt;
    if (!sort && !std::is_sorted(order.begin(), order.end())) {
      std::vector<int64_t> place(order.size());
      for (size_t k = 0; k < order.size(); k++) place[size_t(order[k])] = int64_t(k);
      permute_rows(pt, place, scratch);
      rows = scratch;
    }
    Combine store;
    store.a = rows;
    store.store = out.transposed();
    run(store, threads_);
  }

  const Kind kind_;
  const double u_;
  const int64_t n_;
  const int threads_;
  const Matrix q_;
  Workspace workspace_;
  Panels pool_[kPanels];
};

// The first element of largest magnitude.
int64_t largest_at(int64_t n, const double* x) {
  double most = 0;
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::abs(x[i]));
  return std::find_if(x, x + n, [&](double value) { return std::abs(value) == most; }) - x;
}

}  // namespace

size_t eigenbasis_bytes(int64_t n) {
  const size_t square = Workspace::rounded(size_t(n * n) * sizeof(double));
  return 2 * square + std::max(2 * panel_bytes(n, n, Kind::kF64), eigen_bytes(n));
}

bool eigenbasis(const Matrix& a, std::vector<double>& values, const Matrix& vectors, int threads) {
  const int64_t n = a.rows;
  const size_t size = size_t(n), square = size * size * sizeof(double);
  if (std::isnan(max_abs(a, threads))) return false;
  Workspace workspace(2 * Workspace::rounded(square));
  double* const mean = static_cast<double*>(workspace.take(square));
  double* const rows = static_cast<double*>(workspace.take(square));
  const auto dense = [n](double* data) { return Matrix{data, n, n, n, 1, DType::kF64}; };
  {
    Workspace packed(2 * panel_bytes(n, n, Kind::kF64));
    Pack pack;
    pack.x = a;
    pack.out = take_panels(packed, n, n, Kind::kF64);
    pack.out_t = take_panels(packed, n, n, Kind::kF64);
    run(pack, threads);
    Combine half;
    half.a = pack.out;
    half.b = pack.out_t;
    half.alpha = half.beta = 0.5;
    half.store = dense(mean);
    run(half, threads);
  }
  std::vector<double> ascending(size);
  if (!eigendecompose(n, mean, ascending.data(), rows, threads)) return false;
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return ascending[i] > ascending[j]; });
  values.resize(size);
  double* const sorted = mean;
  constexpr int64_t kRows = 32;  // a job
  parallel_jobs(ceil_div(n, kRows), threads, [&](int64_t job) {
    for (int64_t k = job * kRows; k < std::min((job + 1) * kRows, n); k++) {
      values[size_t(k)] = ascending[order[size_t(k)]];
      const double* const from = rows + order[size_t(k)] * size;
      const double sign = from[largest_at(n, from)] < 0 ? -1 : 1;
      for (int64_t i = 0; i < n; i++) sorted[k * n + i] = sign * from[i];
    }
  });
  Workspace packed(panel_bytes(n, n, Kind::kF64));
  Pack result;
  result.x = dense(sorted);
  result.out = take_panels(packed, n, n, Kind::kF64);
  run(result, threads);
  Combine write;
  write.a = result.out;
  write.store = vectors.transposed();
  run(write, threads);
  return true;
}

Refresh refresh_eigenbasis(const Matrix& q, const Matrix& a, bool sort, const Matrix& q_new,
                           int threads) {
  return Refresher(q, a, threads).run_on(a, sort, q_new);
}

size_t refresh_bytes(int64_t n, DType dtype) {
  const Kind kind = dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
  // The panels; C or probes.
  return (Refresher::kPanels + 1) * panel_bytes(n, n, kind) + Probes::bytes(n, kind);
}

double refresh_work(int64_t n) { return 5.0 * double(n) * double(n) * double(n); }

namespace {

void put(const Tensor& values, int64_t matrix, const std::vector<double>& from,
         const std::vector<int64_t>& order) {
  const int64_t n = values.size(-1);
  for (int64_t k = 0; k < n; k++) {
    const double value = from[size_t(order.empty() ? k : order[size_t(k)])];
    if (values.scalar_type() == kDouble)
      values.data_ptr<double>()[matrix * n + k] = value;
    else
      values.data_ptr<float>()[matrix * n + k] = float(value);
  }
}

std::tuple<Tensor, Tensor> empty_results(const Tensor& a) {
  const auto sizes = a.sizes();
  return {empty(sizes.slice(0, sizes.size() - 1), a), empty(sizes, a)};
}

std::tuple<Tensor, Tensor> eigenbasis_op(const Tensor& a) {
  count_call("eigenbasis", "cpu");
  check_full_precision(a, "a");
  check_square(a, "a");
  auto [values, vectors] = empty_results(a);
  if (a.numel() == 0) return {values, vectors};
  const MatrixBatch as(a), vs(vectors);
  const std::vector<double> nan(size_t(a.size(-1)), kNaN);
  parallel_matrices(std::vector<double>(size_t(as.count()), 10 * refresh_work(a.size(-1))),
                    [&, &values = values](int64_t i, int threads) {
                      std::vector<double> found;
                      if (eigenbasis(as[i], found, vs[i], threads))
                        return put(values, i, found, {});
                      put(values, i, nan, {});
                      fill(vs[i], kNaN);
                    });
  return {values, vectors};
}

std::tuple<Tensor, Tensor> refresh_eigenbasis_op(const Tensor& q, const Tensor& a, bool sort) {
  count_call("refresh_eigenbasis", "cpu");
  check_full_precision(q, "q");
  check_full_precision(a, "a");
  check_square(a, "a");
  check_same_shape(q, "q", a, "a");
  CHECK_TYPE(q.scalar_type() == a.scalar_type(), "q is ", q.scalar_type(), " but a is ",
             a.scalar_type());
  auto [values, vectors] = empty_results(a);
  if (a.numel() == 0) return {values, vectors};
  const MatrixBatch qs(q), as(a), vs(vectors);
  const std::vector<double> nan(size_t(a.size(-1)), kNaN);
  parallel_matrices(
      std::vector<double>(size_t(as.count()), refresh_work(a.size(-1))),
      [&, &values = values](int64_t i, int threads) {
        if (std::isnan(max_abs(qs[i], threads)) || std::isnan(max_abs(as[i], threads))) {
          put(values, i, nan, {});
          return fill(vs[i], kNaN);
        }
        const Refresh result = refresh_eigenbasis(qs[i], as[i], sort, vs[i], threads);
        put(values, i, result.values, sort ? result.order : std::vector<int64_t>{});
      });
  return {values, vectors};
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("eigenbasis", &boxed<&eigenbasis_op>);
  m.impl("refresh_eigenbasis", &boxed<&refresh_eigenbasis_op>);
}

}  // namespace spectral_kernels::cpu
