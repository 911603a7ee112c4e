// The fused DeVA step: rotation into the factors' eigenbases, momentum, Newton–Schulz, variance
// adaptation, rotation back. reference/deva.py is the specification.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../check.h"
#include "../check_deva.h"
#include "../counters.h"
#include "../registration.h"
#include "../step_calls.h"
#include "eigenbasis/eigenbasis_step.h"
#include "list_step.h"
#include "newton_schulz.h"
#include "parallel.h"
#include "rounding.h"
#include "views.h"

namespace spectral_kernels::cpu {
namespace {

struct DevaStep : DevaOptions {
  double lr;
  Variance kind;
  bool check;  // what is not finite

  bool relative() const { return eps_mode == "relative"; }
  EpsPlace place() const { return eps_mode == "outside" ? EpsPlace::kOutside : EpsPlace::kInside; }
};

std::vector<double> square_roots(std::vector<double> x, double scale) {
  for (double& value : x) value = std::sqrt(value * scale);
  return x;
}

double sum(const std::vector<double>& x) {
  double total = 0;
  for (double value : x) total += value;
  return total;
}

// Adds up what every block row left, column by column.
std::vector<double> added(const std::vector<double>& partial, int64_t blocks, int64_t n) {
  std::vector<double> total(size_t(n), 0.0);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t j = 0; j < n; j++) total[size_t(j)] += partial[size_t(b * n + j)];
  return total;
}

// sqrt(energy / v) of two numbers, with its eps.
double ratio(double energy, double v, double eps, EpsPlace place) {
  const double top = std::sqrt(energy);
  const double below = place == EpsPlace::kOutside ? std::sqrt(v) + eps : std::sqrt(v + eps);
  return below == 0 && top == 0 ? 1 : top / below;
}

// The matrices of one parameter.
struct DevaTensors {
  Matrix param, grad, moment, squares;
  Sides sides;

  // Scratch for N, U and their transposes.
  size_t extra() const {
    const Kind kind = moment.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
    return panel_bytes(grad.rows, grad.cols, kind) + 2 * panel_bytes(grad.cols, grad.rows, kind);
  }
  size_t bytes(const NewtonSchulz* ns, bool refresh) const {
    const int64_t s = std::min(grad.rows, grad.cols), l = std::max(grad.rows, grad.cols);
    const size_t iteration = ns == nullptr ? 0 : Workspace::rounded(ns->workspace_bytes(s, l));
    return EigenbasisStep::bytes(grad, moment, sides, extra(), iteration, refresh) +
           Undo::bytes({param, moment, squares}) + sides_bytes(sides);
  }
};

class DevaMatrix {
 public:
  DevaMatrix(const DevaStep& step, const NewtonSchulz& ns, const DevaTensors& tensors, double scale,
             double t, int threads)
      : step_(step),
        ns_(ns),
        param_(tensors.param),
        moment_(tensors.moment),
        squares_(tensors.squares),
        sides_(tensors.sides),
        m_(tensors.grad.rows),
        n_(tensors.grad.cols),
        scale_(scale),
        t_(t),
        threads_(threads),
        kind_(moment_.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32),
        rotated_(tensors.grad, step.maximize, moment_, sides_, step.shampoo_beta, tensors.extra(),
                 threads) {}

  enum class Outcome { kSkipped, kIdle, kUpdated };

  Outcome run_step(bool bounded, bool refresh) {
    const double largest = rotated_.largest_gradient();
    const bool outside = largest != 0 && (largest < 0x1p-50 || largest > 0x1p50);  // false for NaN
    if (bounded && outside) return Outcome::kSkipped;
    if (step_.check && !rotated_.finite_input()) return Outcome::kSkipped;
    const bool first = rotated_.uninitialised();
    rotated_.pack_gradient();
    const bool idle = first && step_.public_schatten();
    Undo undo({param_, moment_, squares_}, step_.check && !idle);
    Undo undo_sides({sides_.left, sides_.right, sides_.left_basis, sides_.right_basis},
                    step_.check && (first || refresh));
    if (first && !rotated_.initialise(step_.check)) return Outcome::kSkipped;
    if (idle) {
      if (step_.check && !all_finite({moment_, squares_}, threads_)) return Outcome::kSkipped;
      undo_sides.commit();
      return Outcome::kIdle;
    }
    Panels g = rotated_.rotated();
    if (step_.check && !(rotated_.squares_fit(g) && (first || rotated_.factors_fit())))
      return Outcome::kSkipped;
    const Panels u = step_.schatten() ? schatten(g) : sign_step(g);
    if (!u) return Outcome::kSkipped;
    const double decay = 1 - step_.lr * step_.weight_decay;
    double rate = step_.lr;
    if (step_.public_schatten()) {
      rate *= decay;
      if (step_.correct_bias)
        rate *= std::sqrt(1 - std::pow(step_.beta2, t_)) / (1 - std::pow(step_.beta1, t_));
    }
    // After a 16-bit Newton-Schulz the way back adds a quarter of its error to it.
    const bool halves = step_.schatten() && kind_ == Kind::kF32 && ns_.kind() == Kind::kBF16;
    const Kind precision = halves ? Kind::kBF16 : kind_;
    rotated_.move(u, param_, rate, decay, step_.normalize_grads, precision);
    // The moment is an average of finite numbers; factors fit.
    if (step_.check && !all_finite({param_, squares_}, threads_)) return Outcome::kSkipped;
    if (!first) {
      rotated_.accumulate();
      if (refresh) rotated_.refresh(has_squares() ? squares_ : Matrix{}, step_.public_schatten());
      if (step_.check && refresh && !all_finite({moment_}, threads_)) return Outcome::kSkipped;
    }
    undo.commit();
    undo_sides.commit();
    return Outcome::kUpdated;
  }

 private:
  bool has_squares() const {
    return step_.kind != Variance::kLowMemory && step_.kind != Variance::kNone;
  }
  double m_scale() const { return step_.debias() ? 1 / (1 - std::pow(step_.beta1, t_)) : 1; }
  double v_scale() const { return step_.debias() ? 1 / (1 - std::pow(step_.beta2, t_)) : 1; }

  Panels out_of(VarianceAdaptation& work, const Panels& plain) {
    if (!rotated_.wants_transposed()) return work.out = plain;
    return work.out_t = rotated_.take_transposed();
  }

  Panels schatten(const Panels& g) {
    const int64_t blocks = row_blocks(m_, kind_);
    std::vector<double> m_rows(size_t(m_), 0.0), g_rows(size_t(m_), 0.0),
        v_sums(size_t(blocks), 0.0);
    std::vector<double> m_cols(size_t(blocks * n_), 0.0), g_cols(size_t(blocks * n_), 0.0);
    const Panels mix = rotated_.take();
    Momentum momentum;
    momentum.g = g;
    momentum.m = moment_;
    momentum.beta1 = step_.beta1;
    momentum.nesterov = step_.nesterov;
    momentum.sign = step_.sign;
    momentum.out = mix;
    if (step_.kind != Variance::kNone) {
      momentum.m_rows = m_rows.data();
      momentum.m_cols = m_cols.data();
      momentum.g_rows = g_rows.data();
      momentum.g_cols = g_cols.data();
    }
    if (has_squares() && step_.relative()) {
      momentum.v = squares_;
      momentum.v_sums = v_sums.data();
    }
    run(momentum, threads_);

    const Panels o = orthogonalized(mix, g);
    VarianceAdaptation adapt;
    adapt.o = o;
    adapt.scale = scale_;
    const std::vector<double> ones_m(size_t(m_), 1.0), ones_n(size_t(n_), 1.0);
    adapt.row = ones_m.data();
    adapt.col = ones_n.data();
    const double mhat = m_scale() * m_scale();
    const std::vector<double> m_total = added(m_cols, blocks, n_),
                              g_total = added(g_cols, blocks, n_);
    std::vector<double> seen_row, seen_col, row, col;
    if (step_.kind == Variance::kLowMemory) {
      low_memory(m_rows, m_total, g_rows, g_total, row, col);
    } else if (has_squares()) {
      const bool seen_m = step_.kind == Variance::kMomentum,
                 top_m = step_.kind != Variance::kInstant;
      seen_row = square_roots(seen_m ? m_rows : g_rows, seen_m ? mhat : 1);
      seen_col = square_roots(seen_m ? m_total : g_total, seen_m ? mhat : 1);
      row = square_roots(top_m ? m_rows : g_rows, top_m ? mhat : 1);
      col = square_roots(top_m ? m_total : g_total, top_m ? mhat : 1);
      adapt.v = squares_;
      adapt.beta2 = step_.beta2;
      adapt.v_scale = v_scale();
      adapt.place = step_.place();
      adapt.seen_row = seen_row.data();
      adapt.seen_col = seen_col.data();
      adapt.eps = step_.eps;
      if (step_.relative()) {
        const double mean =
            (step_.beta2 * sum(v_sums) + (1 - step_.beta2) * sum(seen_row) * sum(seen_col)) /
            double(m_ * n_);
        adapt.eps *= mean * adapt.v_scale;
      }
    }
    if (!row.empty()) {
      adapt.row = row.data();
      adapt.col = col.data();
    }
    const Panels u = out_of(adapt, o);
    run(adapt, threads_);
    return u;
  }

  // v_r and v_c, packed in this order; Gamma_ij = row_i col_j.
  void low_memory(const std::vector<double>& m_rows, const std::vector<double>& m_cols,
                  const std::vector<double>& g_rows, const std::vector<double>& g_cols,
                  std::vector<double>& row, std::vector<double>& col) {
    const double mhat = m_scale() * m_scale();
    const auto side = [&](const std::vector<double>& seen, const std::vector<double>& top,
                          int64_t offset) {
      const int64_t count = int64_t(seen.size());
      Matrix state = squares_;  // 1 x (m + n)
      state.data = static_cast<char*>(squares_.data) +
                   offset * squares_.col_stride * int64_t(element_size(squares_.dtype));
      state.cols = count;
      std::vector<double> v(seen.size());
      copy_scaled(state, 0, Matrix{v.data(), 1, count, count, 1, DType::kF64});
      for (size_t i = 0; i < v.size(); i++) v[i] = step_.beta2 * v[i] + (1 - step_.beta2) * seen[i];
      copy_scaled(Matrix{v.data(), 1, count, count, 1, DType::kF64}, 0, state);
      double eps = step_.eps;
      if (step_.relative()) eps *= sum(v) * v_scale() / double(count);
      std::vector<double> gamma(v.size());
      for (size_t i = 0; i < v.size(); i++)
        gamma[i] = std::sqrt(ratio(top[i] * mhat, v[i] * v_scale(), eps, step_.place()));
      return gamma;
    };
    row = side(g_rows, m_rows, 0);
    col = side(g_cols, m_cols, m_);
  }

  // The matrix sign of N as panels of N's shape, into `out`.
  Panels orthogonalized(const Panels& mix, const Panels& out) {
    const double largest = max_abs(flat(mix), threads_);
    if (largest == 0 || std::isnan(largest)) {
      Combine constant;
      constant.a = mix;
      constant.alpha = largest == 0 ? 1 : largest;
      constant.out = out;  // zeros, or throughout the NaN that the caller asked to propagate
      run(constant, threads_);
      return out;
    }
    const bool wide = m_ <= n_;
    const int64_t s = std::min(m_, n_), l = std::max(m_, n_);
    Workspace workspace(ns_.workspace_bytes(s, l));
    const NewtonSchulz::Input input = ns_.take_input(workspace, s, l);
    const int shift = -exponent_of(largest);
    Combine scale;  // exact: a power of two, in two factors that are in range
    scale.a = mix;
    scale.alpha = std::ldexp(1.0, shift);
    scale.out = wide ? input.x : input.xt;
    scale.out_t = wide ? input.xt : input.x;
    run(scale, threads_);
    Product last;
    (wide ? last.out : last.out_t) = out;
    ns_.iterate(input, shift, last, workspace, threads_);
    return out;
  }

  Panels sign_step(const Panels& g) {
    SignAdaptation work;
    work.g = g;
    work.m = moment_;
    work.beta1 = step_.beta1;
    work.beta2 = step_.beta2;
    work.m_scale = m_scale();
    work.v_scale = v_scale();
    work.scale = scale_;
    work.nesterov = step_.nesterov;
    work.seen_m = step_.kind == Variance::kMomentum;
    work.top_m = step_.kind != Variance::kInstant;
    work.place = step_.place();
    work.eps = step_.eps;
    if (has_squares()) {
      work.v = squares_;
      const double total = run(work, threads_);
      if (step_.relative()) work.eps *= total * work.v_scale / double(m_ * n_);
    }
    work.pass = 1;
    const Panels u =
        rotated_.wants_transposed() ? work.out_t = rotated_.take_transposed() : work.out = g;
    run(work, threads_);
    return u;
  }

  const DevaStep& step_;
  const NewtonSchulz& ns_;
  const Matrix param_, moment_, squares_;
  const Sides sides_;
  const int64_t m_, n_;
  const double scale_, t_;
  const int threads_;
  const Kind kind_;
  EigenbasisStep rotated_;
};

// State of the variance, of the parameter's shape; for "low_memory" one row of m + n numbers a
// matrix.
Matrix squares_of(const Tensor& state, const Item& item, Variance variance) {
  if (state.numel() == 0 || variance == Variance::kNone) return {};
  if (variance != Variance::kLowMemory) return MatrixBatch(state)[item.index];
  const Tensor rows = state.unsqueeze(-2);
  return MatrixBatch(rows)[item.index];
}

std::vector<Tensor> squares_as_matrices(TensorList states, Variance variance) {
  std::vector<Tensor> list = states.vec();
  for (Tensor& state : list)
    if (variance == Variance::kNone)
      state = empty({0}, state);
    else if (variance == Variance::kLowMemory)
      state = state.unsqueeze(-2);
  return list;
}

void deva_step_(const BasisLists& lists, const DevaOptions& options) {
  count_call("deva_step_", "cpu");
  check_step(lists);
  check_moment(lists.exp_avgs, "exp_avgs", lists.params);
  check_eigenbasis_lists(lists);
  const Variance kind = check_deva(lists, options, true);
  check_eigenbasis_distinct(lists, kind != Variance::kNone);
  const NonFinite policy = nonfinite_policy(options.nonfinite);
  const DevaStep step{options, scalar(lists.lr), kind, policy != NonFinite::kPropagate};
  // Rows are not used by the elementwise norm, and may be empty there.
  const double identity[] = {1, 0, 0};
  const auto make = [&](ScalarType type) {
    return NewtonSchulz(options.rows.empty() && !step.schatten() ? ArrayRef<double>(identity)
                                                                 : ArrayRef<double>(options.rows),
                        "standard", {}, type, 0, "schatten8", 1);
  };
  const NewtonSchulz ns = make(options.compute_dtype), ns64 = make(kDouble);
  const std::vector<Item> items = items_of(lists.params);
  if (policy == NonFinite::kRaise)
    raise_nonfinite(items, lists, squares_as_matrices(lists.exp_avg_sqs, kind));
  std::vector<double> work = eigenbasis_work(items, lists);
  const auto newton_schulz_of = [&](size_t e) -> const NewtonSchulz& {
    return lists.params[e].scalar_type() == kDouble ? ns64 : ns;
  };
  if (step.schatten())
    for (size_t i = 0; i < items.size(); i++) {
      const size_t e = size_t(items[i].entry);
      const int64_t m = lists.params[e].size(-2), n = lists.params[e].size(-1);
      work[i] += newton_schulz_of(e).work(std::min(m, n), std::max(m, n));
    }
  const auto tensors_of = [&](const Item& item) {
    const size_t e = size_t(item.entry);
    return DevaTensors{MatrixBatch(lists.params[e])[item.index],
                       MatrixBatch(lists.grads[e])[item.index],
                       MatrixBatch(lists.exp_avgs[e])[item.index],
                       squares_of(lists.exp_avg_sqs[e], item, kind), sides_of(item, lists)};
  };
  std::vector<size_t> bytes;
  for (const Item& item : items) {
    const size_t e = size_t(item.entry);
    const NewtonSchulz* iteration = step.schatten() ? &newton_schulz_of(e) : nullptr;
    DevaTensors tensors = tensors_of(item);
    const size_t copies = Widened::bytes({tensors.moment, tensors.squares});
    tensors.moment = in_full(tensors.moment);
    tensors.squares = in_full(tensors.squares);
    bytes.push_back(tensors.bytes(iteration, lists.refresh[e] != 0) + copies);
  }
  Progress progress(lists.step_counts, lists.skipped);
  const auto update = [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    const size_t e = size_t(item.entry);
    DevaTensors tensors = tensors_of(item);
    Widened wide({&tensors.moment, &tensors.squares}, threads);
    const double count = progress.step(item);
    DevaMatrix matrix(step, newton_schulz_of(e), tensors, options.scales[e], count + 1, threads);
    const bool factors = lists.lefts[e].numel() > 0 || lists.rights[e].numel() > 0;
    const bool bounded =
        !options.reference && step.relative() && (kind != Variance::kNone || factors);
    const auto outcome = matrix.run_step(bounded, lists.refresh[e] != 0);
    if (outcome == DevaMatrix::Outcome::kSkipped) return progress.skip();
    wide.round_back(count);
    if (outcome == DevaMatrix::Outcome::kUpdated) progress.updated(item);
  };
  parallel_matrices(work, update, bytes);
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("deva_step_", &boxed_step<BasisLists, DevaOptions, &deva_step_>);
}

}  // namespace spectral_kernels::cpu
