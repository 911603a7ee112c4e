// Inverse p-th roots by a coupled iteration on packed symmetric matrices, with an
// eigendecomposition in fp64 as the fallback. reference/inverse_root.py is the specification.
#include "root.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../../root_results.h"
#include "../../root_rows.h"
#include "../eigen/eigen.h"
#include "../parallel.h"
#include "../probes.h"
#include "../views.h"
#include "pole_sum.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// An old root's end of the spectrum may have come down this far.
constexpr double kDrift = 4;
constexpr double kTrialLimit = 0.1;

double unit_roundoff(Kind kind) {
  return kind == Kind::kF64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24);
}

double residual_limit(Kind kind, double low) {
  return kind == Kind::kF64 ? std::min(0.25, std::max(1e-6, 1e-12 / low)) : 0.25;
}

// Of a decomposed matrix, packed in fp64: V, Vᵀ and the matrix itself.
struct Eigenvectors {
  static size_t bytes(int64_t n) { return 3 * panel_bytes(n, n, Kind::kF64); }

  // The rows of `vt` are the eigenvectors.
  Eigenvectors(const Matrix& a, const Matrix& vt, int threads)
      : workspace(bytes(a.rows)),
        columns(take_panels(workspace, a.rows, a.rows, Kind::kF64)),
        rows(take_panels(workspace, a.rows, a.rows, Kind::kF64)),
        matrix(take_panels(workspace, a.rows, a.rows, Kind::kF64)) {
    Pack pack;
    pack.x = vt;
    pack.out = rows;
    pack.out_t = columns;
    run(pack, threads);
    pack = {};
    pack.x = a;
    pack.out = matrix;
    run(pack, threads);
  }

  Workspace workspace;
  Panels columns, rows, matrix;
};

// One matrix, scaled by 2^-shift with shift a multiple of p.
class RootProblem {
 public:
  // A, B, B² and the eight of a sum over poles; or M, X, N, the next M, and three for the powers
  // of N.
  static constexpr int kPanels = 11;

  RootProblem(const Matrix& a, double divisor, const RootOptions& options, bool write_failures,
              int threads)
      : options_(options),
        kind_(a.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32),
        u_(unit_roundoff(kind_)),
        n_(a.rows),
        threads_(threads),
        divisor_(divisor),
        write_failures_(write_failures),
        workspace_(kPanels * panel_bytes(n_, n_, kind_)) {
    for (Panels& panels : pool_) panels = take_panels(workspace_, n_, n_, kind_);
  }

  // A zero matrix without ridge, or a non-finite one, is finished here.
  bool prepare(const Matrix& a, const Matrix& out) {
    const double of_a = max_abs(a, threads_);
    const double largest = std::max(of_a, options_.ridge * divisor_);
    if (std::isnan(of_a)) {
      if (write_failures_) fill(out, kNaN);
      result_ = {RootStatus::kNonFinite, 0, kNaN, kNaN};
      return false;
    }
    if (largest == 0) {
      fill(out, 0);
      result_ = {RootStatus::kRankDeficient, 0, 0, 0};
      return false;
    }
    const int exponent = exponent_of(largest);
    shift_ = options_.p * int(std::floor(double(exponent) / options_.p));
    Panels original = acquire(), transposed = acquire();
    a_ = acquire();
    Pack pack;
    pack.x = a;
    pack.shift = -shift_;
    pack.out = original;
    pack.out_t = transposed;
    run(pack, threads_);
    combine(a_, original, 0.5, transposed, 0.5, 0);
    release(original);
    release(transposed);
    const std::vector<double> sums = column_sums(ColumnSum::kAbs, a_, {}, threads_);
    const double row_sum = *std::max_element(sums.begin(), sums.end());
    delta_ =
        std::max(std::ldexp(options_.ridge * divisor_, -shift_), options_.relative_ridge * row_sum);
    if (kind_ == Kind::kF32) delta_ = double(float(delta_));
    result_.delta = std::ldexp(delta_ / divisor_, shift_);
    return true;
  }

  RootResult solve(const Matrix& old, const Matrix& out) {
    const bool few = options_.method == "auto" && n_ <= kMostRootRowsDecomposed;
    if (options_.method != "eigen" && !few) {
      set_shifted();
      const bool ridged = delta_ >= 4 * u_ * nu_;
      const double low = ridged ? delta_ / nu_ : 4 * u_;
      set_limits(low);
      const double expected = old ? end_of_old(old) / kDrift : 0;
      if (expected > low && cheapest(expected, true, out)) return result_;
      if (options_.method == "iteration" || ridged) {
        if (cheapest(low, false, out) || iterate_twice(low, out)) return result_;
        eigen(out);
        if (result_.status == RootStatus::kConverged) result_.status = RootStatus::kFellBack;
        return result_;
      }
    }
    eigen(out);
    if ((options_.method == "eigen" || few) && !factored_) iterate_instead(out);
    return result_;
  }

  const RootResult& result() const { return result_; }

 private:
  // Where LAPACK has failed, and once more on one thread, and the ridge bounds the spectrum.
  void iterate_instead(const Matrix& out) {
    set_shifted();
    const double low = delta_ / nu_;
    if (low < 4 * u_) return;
    set_limits(low);
    if (iterate_twice(low, out) && result_.status == RootStatus::kConverged)
      result_.status = RootStatus::kFellBack;
  }

  // Once more for a longer spectrum where that is refused.
  bool iterate_twice(double low, const Matrix& out) {
    return iterate(low, false, out) || iterate(low / 16, false, out);
  }

  // By a sum over poles where there is one for this matrix.
  bool cheapest(double low, bool trial, const Matrix& out) {
    const Poles* poles =
        options_.method == "iteration" ? nullptr : poles_for(low, options_.p, n_, kind_);
    if (poles == nullptr) return trial && iterate(low, true, out);
    PoleSum call{b_, square_, 1 / nu_, {}, {}, {}, {}};
    for (auto* panels : {&call.sums, &call.shifted, &call.w, &call.wt})
      for (Panels& one : *panels) one = acquire();
    const Panels x = run(*poles, call, threads_);
    const bool accepted = x && accept(x, low, trial, pole_count(*poles), out);
    for (const auto* panels : {&call.wt, &call.w, &call.shifted, &call.sums})
      for (const Panels& one : *panels) release(one);
    return accepted;
  }

  // B = A + delta I, its square and nu.
  void set_shifted() {
    b_ = acquire();
    combine(b_, a_, 1, {}, 0, delta_);
    square_ = acquire();
    symmetric(b_, b_, 1, square_);
    nu_ = std::pow(sum_of_squares(square_, threads_), 0.25) * (1 + 4 * u_);
  }

  // Of the residuals of an accepted root, where the spectrum of B / nu begins at `low`.
  void set_limits(double low) {
    limit_ = residual_limit(kind_, low);
    weighted_limit_ = 256 * u_ * (options_.p + std::pow(low, -1.0 / options_.p));
  }

  Panels acquire() { return pool_[size_t(--free_)]; }
  void release(const Panels& panels) { pool_[size_t(free_++)] = panels; }

  void combine(const Panels& out, const Panels& a, double alpha, const Panels& b, double beta,
               double gamma) const {
    run(Combine{a, b, out, {}, alpha, beta, gamma, 0, {}, {}}, threads_);
  }

  void symmetric(const Panels& a, const Panels& b, double alpha, const Panels& out) {
    Product p;
    p.a = p.a_t = a;
    p.b = b;
    p.symmetric = true;
    p.alpha = alpha;
    p.out = out;
    run(p, threads_);
  }

  // alpha N^p M into `out`; N survives.
  void power_times(const Panels& n, const Panels& m, double alpha, const Panels& out) {
    Panels power = n, square = n;
    bool own_power = false, own_square = false, has_power = false;
    for (int exponent = options_.p;;) {
      if (exponent % 2 != 0) {
        if (!has_power) {
          power = square;
          own_power = own_square;
          own_square = false;
          has_power = true;
        } else {
          const Panels next = acquire();
          symmetric(power, square, 1, next);
          if (own_power) release(power);
          power = next;
          own_power = true;
        }
      }
      exponent /= 2;
      if (exponent == 0) break;
      const Panels next = acquire();
      symmetric(square, square, 1, next);
      if (own_square) release(square);
      square = next;
      own_square = true;
    }
    symmetric(power, m, alpha, out);
    if (own_power) release(power);
    if (own_square) release(square);
  }

  // N = a + b (s M) + c (s M)² into `out`.
  void quadratic(const Panels& m, const RootRow& row, double s, const Panels& out) {
    Product p;
    p.a = p.a_t = p.b = m;
    p.symmetric = true;
    p.alpha = row.c * s * s;
    p.beta_panels = row.b * s;
    p.add_panels = m;
    p.gamma = row.a;
    p.out = out;
    run(p, threads_);
  }

  // Rows for eigenvalues from `low` to 1. A trial is a guess of `low`: eigenvalues below it would
  // be missed. True, with the root written, if that is accepted.
  bool iterate(double low, bool trial, const Matrix& out) {
    const std::vector<RootRow> rows = root_schedule(low, options_.p, root_tolerance(u_));
    Panels m = b_, x = {};
    for (size_t step = 0; step < rows.size(); step++) {
      const RootRow& row = rows[step];
      const double scale = step == 0 ? 1 / nu_ : 1;  // M is B / nu, and B stays for the residual
      const Panels n = acquire();
      if (row.c == 0)
        combine(n, m, row.b * scale, {}, 0, row.a);
      else
        quadratic(m, row, scale, n);
      if (step + 1 < rows.size()) {
        const Panels next = acquire();
        power_times(n, m, scale, next);
        if (step > 0) release(m);
        m = next;
      }
      if (step == 0) {
        x = n;
      } else {
        const Panels next = acquire();
        symmetric(n, x, 1, next);  // in this order the residual is about half of the other's
        release(x);
        release(n);
        x = next;
      }
    }
    if (rows.size() > 1) release(m);
    if (rows.empty()) {
      x = acquire();
      combine(x, {}, 0, {}, 0, 1);
    }
    const bool accepted = accept(x, low, trial, int64_t(rows.size()), out);
    release(x);
    return accepted;
  }

  // Whether X is the root of B / nu, by its residual and diagonal; then it is written.
  bool accept(const Panels& x, double low, bool trial, int64_t steps, const Matrix& out) {
    double least = std::numeric_limits<double>::infinity(), most = 0;
    for (int64_t i = 0; i < n_; i++) {
      least = std::min(least, element(x, i, i));
      most = std::max(most, element(x, i, i));
    }
    double residual;
    bool accepted;
    {
      Probes probes(n_, kind_);
      residual = residual_of(x, probes);
      accepted = residual <= limit_ && least > 0 && weighted_residual(x, probes) <= weighted_limit_;
      if (accepted && trial) {
        // Eigenvalues that the guess missed are the smallest. The probes turn towards those, where
        // a residual shows the lost ones and the end those that were nearly reached.
        double end = 0;
        for (int turn = 0; turn < 3; turn++) end = lower_end(x, probes);
        accepted = end >= low && residual_of(x, probes) <= kTrialLimit;
      }
    }
    if (accepted) {
      result_.status = RootStatus::kConverged;
      result_.steps = steps;
      result_.residual = residual;
      // (A / d + delta)^(-1/p) = d^(1/p) (A + d delta)^(-1/p); the ridge has been multiplied by d.
      const double scale =
          std::ldexp(std::pow(nu_ / divisor_, -1.0 / options_.p), -shift_ / options_.p);
      if (may_write(most * scale)) {
        Combine c;
        c.a = x;
        c.alpha = scale;
        c.store = out;
        run(c, threads_);
      }
    }
    return accepted;
  }

  // A root that overflows is a failure that keeps the old one.
  bool may_write(double largest) {
    const double most = kind_ == Kind::kF64 ? std::numeric_limits<double>::max()
                                            : double(std::numeric_limits<float>::max());
    if (write_failures_ || largest <= most) return true;
    result_.status = RootStatus::kStagnated;
    return false;
  }

  void times(const Panels& a, double alpha, const Panels& columns, const Panels& out) const {
    Product p;
    p.a = a;
    p.b = columns;
    p.alpha = alpha;
    p.out = out;
    run(p, threads_);
  }

  // ||X||_2 by four power steps from the probes, which become X^4 times what they were, but for
  // their length.
  double largest_eigenvalue(const Panels& x, Probes& probes) {
    double before = 1;
    for (int step = 0; step < 4; step++) {
      if (step == 3) before = std::sqrt(sum_of_squares(probes.columns, 1));
      times(x, 1, probes.columns, probes.next);
      std::swap(probes.columns, probes.next);
    }
    const double after = std::sqrt(sum_of_squares(probes.columns, 1));
    combine(probes.columns, probes.columns, std::ldexp(1, -exponent_of(after)), {}, 0, 0);
    return after / before;
  }

  // A power of two, at most about half the smallest eigenvalue of B / nu, from its root X.
  double lower_end(const Panels& x, Probes& probes) {
    const double largest = largest_eigenvalue(x, probes);
    return std::exp2(std::floor(std::log2(0.5 * std::pow(largest, -double(options_.p)))));
  }

  // The same from a root of an earlier A, 0 if there is none.
  double end_of_old(const Matrix& old) {
    const double largest = max_abs(old, threads_);
    if (!(largest > 0 && std::isfinite(largest))) return 0;
    const int exponent = exponent_of(largest);
    const Panels x = acquire();
    Pack pack;
    pack.x = old;
    pack.shift = -exponent;
    pack.out = x;
    run(pack, threads_);
    Probes probes(n_, kind_);
    const double scale =
        std::ldexp(1, exponent) * std::pow(std::ldexp(nu_ / divisor_, shift_), 1.0 / options_.p);
    const double end = std::pow(scale * largest_eigenvalue(x, probes), -double(options_.p));
    release(x);
    return std::isfinite(end) ? std::exp2(std::floor(std::log2(0.5 * std::min(end, 1.0)))) : 0;
  }

  // ||(X^floor(p/2) (B / nu) X^ceil(p/2) - I) Y||_F / ||Y||_F on the probes Y, which survive.
  double residual_of(const Panels& x, Probes& probes) {
    const int first = options_.p - options_.p / 2;
    return relative_change(x, probes.columns, first, options_.p / 2, probes);
  }

  // ||((B / nu) X^p - I) B Y||_F / ||B Y||_F.
  double weighted_residual(const Panels& x, Probes& probes) {
    times(b_, 1 / nu_, probes.columns, probes.weighted);
    return relative_change(x, probes.weighted, options_.p, 0, probes);
  }

  // ||X^after (B / nu) X^before Y - Y||_F / ||Y||_F.
  double relative_change(const Panels& x, const Panels& of, int before, int after, Probes& probes) {
    Panels y = of;
    const auto apply = [&](const Panels& a, double alpha) {
      times(a, alpha, y, probes.next);
      y = probes.next;
      std::swap(probes.next, probes.image);
    };
    for (int i = 0; i < before; i++) apply(x, 1);
    apply(b_, 1 / nu_);
    for (int i = 0; i < after; i++) apply(x, 1);
    combine(y, y, 1, of, -1, 0);
    return std::sqrt(sum_of_squares(y, 1) / sum_of_squares(of, 1));
  }

  void eigen(const Matrix& out) {
    const size_t n = size_t(n_);
    std::vector<double> matrix(n * n), values(n), vectors(n * n);
    const Matrix full{matrix.data(), n_, n_, n_, 1, DType::kF64};
    Combine unpack;
    unpack.a = a_;
    unpack.store = full;
    run(unpack, threads_);
    factored_ = eigendecompose(n_, matrix.data(), values.data(), vectors.data(), threads_);
    result_.steps = 0;
    if (!factored_) {
      result_.status = RootStatus::kStagnated;
      result_.residual = std::numeric_limits<double>::infinity();
      if (write_failures_) fill(out, 0);
      return;
    }
    const double cut = std::max(4 * u_, 4 * double(n_) * std::ldexp(1.0, -53));
    const double largest = std::max(values[n - 1], 0.0);
    const bool indefinite = values[0] < -std::sqrt(double(n_)) * cut * largest;
    std::vector<double> spectrum(n), powers(n);
    bool all_kept = true;
    for (size_t i = 0; i < n; i++) {
      spectrum[i] = std::max(values[i], 0.0) + delta_;
      const bool kept = spectrum[i] > (delta_ > 0 ? 0 : cut * largest);
      powers[i] = kept ? std::pow(spectrum[i], -1.0 / options_.p) : 0;
      all_kept = all_kept && kept;
    }
    const Eigenvectors v(full, Matrix{vectors.data(), n_, n_, n_, 1, DType::kF64}, threads_);
    result_.residual = eigen_residual(v, spectrum, powers, cut);
    size_t first = 0;
    while (first + 1 < n && !(spectrum[first] > checked_above(spectrum, cut))) first++;
    const double low = spectrum[n - 1] > 0 ? spectrum[first] / spectrum[n - 1] : 1;
    if (indefinite || !(result_.residual <= residual_limit(kind_, low))) {
      result_.status = RootStatus::kStagnated;
      if (!write_failures_) return;
    } else {
      result_.status = all_kept ? RootStatus::kConverged : RootStatus::kRankDeficient;
    }
    // V diag(powers) Vᵀ as (V sqrt(powers)) (V sqrt(powers))ᵀ: one triangle, exactly symmetric.
    std::vector<double> roots(n);
    for (size_t j = 0; j < n; j++) roots[j] = std::sqrt(powers[j]);
    Scale scale;
    scale.x = scale.out = v.rows;
    scale.row = roots.data();
    run(scale, threads_);
    Product product;
    product.a = product.b = v.rows;
    product.symmetric = true;
    product.alpha = std::ldexp(std::pow(divisor_, 1.0 / options_.p), -shift_ / options_.p);
    product.store = out;
    const double most = *std::max_element(powers.begin(), powers.end());
    if (may_write(most * product.alpha)) run(product, threads_);
  }

  double checked_above(const std::vector<double>& spectrum, double cut) const {
    return std::max(cut, 1e-12) * spectrum.back();
  }

  // The residual on the eigenvalues that rounding does not hide: P (...) P in place of (...).
  double eigen_residual(const Eigenvectors& v, const std::vector<double>& spectrum,
                        const std::vector<double>& powers, double cut) const {
    const double above = checked_above(spectrum, cut);
    const auto checked_powers = [&](int exponent) {
      std::vector<double> by(powers.size(), 0.0);
      for (size_t j = 0; j < by.size(); j++)
        if (spectrum[j] > above) by[j] = std::pow(powers[j], exponent);
      return by;
    };
    const auto scale_rows = [&](const Panels& x, const std::vector<double>& by, const Panels& out) {
      Scale scale;
      scale.x = x;
      scale.out = out;
      scale.row = by.data();
      run(scale, threads_);
    };
    Probes probes(n_, Kind::kF64);
    const Panels &projected = probes.weighted, &y = probes.image, &z = probes.next;
    times(v.columns, 1, probes.columns, projected);
    scale_rows(projected, checked_powers(0), projected);
    scale_rows(projected, checked_powers(options_.p - options_.p / 2), y);
    times(v.rows, 1, y, z);
    times(v.matrix, 1, z, y);
    combine(y, y, 1, z, delta_, 0);
    times(v.columns, 1, y, z);
    scale_rows(z, checked_powers(options_.p / 2), z);
    times(v.rows, 1, z, y);
    times(v.rows, 1, projected, z);
    combine(y, y, 1, z, -1, 0);
    return std::sqrt(sum_of_squares(y, threads_) / double(n_ * Probes::kCount));
  }

  const RootOptions& options_;
  const Kind kind_;
  const double u_;
  const int64_t n_;
  const int threads_;
  const double divisor_;
  const bool write_failures_;
  Workspace workspace_;
  Panels pool_[kPanels];
  int free_ = kPanels;
  Panels a_, b_, square_;
  int shift_ = 0;
  bool factored_ = false;
  double delta_ = 0, nu_ = 0;
  double limit_ = 0, weighted_limit_ = 0;  // of the residuals
  RootResult result_;
};

}  // namespace

void check_root_options(const RootOptions& options) {
  CHECK_VALUE(options.p >= 1 && options.p <= 8, "p must be in 1..8, got ", options.p);
  CHECK_VALUE(options.ridge >= 0 && std::isfinite(options.ridge), "ridge must be at least 0, got ",
              options.ridge);
  CHECK_VALUE(options.relative_ridge >= 0 && std::isfinite(options.relative_ridge),
              "relative_ridge must be at least 0, got ", options.relative_ridge);
  check_one_of(options.method, "method", {"auto", "iteration", "eigen"});
}

RootResult inverse_root(const Matrix& a, double divisor, const RootOptions& options,
                        const Matrix& old, const Matrix& out, bool write_failures, int threads) {
  RootProblem problem(a, divisor, options, write_failures, threads);
  if (!problem.prepare(a, out)) return problem.result();
  return problem.solve(old, out);
}

size_t root_bytes(int64_t n, DType dtype) {
  const Kind kind = dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
  return RootProblem::kPanels * panel_bytes(n, n, kind) + 2 * Probes::bytes(n, kind) +
         Eigenvectors::bytes(n) + Probes::bytes(n, Kind::kF64) + eigen_bytes(n);
}

double root_work(int64_t n, int p) {
  constexpr double kSteps = 7;
  return (kSteps * (2 + std::log2(double(p)) + 1) + 1) * 0.5 * double(n) * double(n) * double(n);
}

namespace {

RootTuple inverse_root_op(const Tensor& a, int64_t p, double ridge, double relative_ridge,
                          const std::string& method) {
  count_call("inverse_root", "cpu");
  check_full_precision(a, "a");
  check_square(a, "a");
  const RootOptions options{int(p), ridge, relative_ridge, std::string(method)};
  check_root_options(options);
  const RootTensors out(a);
  const MatrixBatch as(a), roots(out.root);
  std::vector<RootResult> results(size_t(as.count()));
  if (a.numel() > 0)
    parallel_matrices(std::vector<double>(results.size(), root_work(a.size(-1), options.p)),
                      [&](int64_t i, int threads) {
                        results[size_t(i)] =
                            inverse_root(as[i], 1, options, {}, roots[i], true, threads);
                      });
  const auto put = [](const Tensor& t, size_t i, double value) {
    if (t.scalar_type() == kDouble)
      t.data_ptr<double>()[i] = value;
    else
      t.data_ptr<float>()[i] = float(value);
  };
  for (size_t i = 0; i < results.size(); i++) {
    out.status.data_ptr<int64_t>()[i] = int64_t(results[i].status);
    out.steps.data_ptr<int64_t>()[i] = results[i].steps;
    put(out.residual, i, results[i].residual);
    put(out.delta, i, results[i].delta);
  }
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) { m.impl("inverse_root", &boxed<&inverse_root_op>); }

}  // namespace spectral_kernels::cpu
