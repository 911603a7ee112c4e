// The fused Shampoo and KL-Shampoo step. reference/inverse_root.py is the specification.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../../step_calls.h"
#include "../kron_factor.h"
#include "../list_step.h"
#include "../parallel.h"
#include "../rounding.h"
#include "../views.h"
#include "root.h"

namespace spectral_kernels::cpu {
namespace {

enum class Graft { kNone, kSgd, kAdagrad, kRmsprop, kAdam };

struct ShampooStep : ShampooOptions {
  double lr;
  RootOptions roots;
  Graft kind;
  bool check;  // what is not finite

  bool relative_eps() const { return graft_eps_mode == "relative"; }
  bool sequential() const { return kl_order == "sequential"; }
  double weight() const { return beta2 < 1 ? 1 - beta2 : 1; }
};

struct ShampooState {
  Matrix momentum, left, right, left_root, right_root, squares;
  int64_t* failures;  // left, right

  // Scratch memory of one step.
  size_t bytes(const Matrix& param, const Matrix& grad, bool refresh) const {
    const int64_t m = grad.rows, n = grad.cols;
    const Kind kind = momentum.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
    const Kind factors = factor_kind(grad.dtype, (left ? left : right).dtype);
    const auto both = [&](Kind of) { return panel_bytes(m, n, of) + panel_bytes(n, m, of); };
    const TwoSidedShape shape{m, n, m, n, bool(left_root), bool(right_root)};
    const size_t squares_of_sides = panel_bytes(m, m, kind) + panel_bytes(n, n, kind);
    const size_t increments = std::max(both(factors), 2 * both(kind) + squares_of_sides);
    const size_t applying =
        2 * both(kind) + squares_of_sides + Workspace::rounded(shape.workspace_bytes(kind));
    size_t roots = 0;
    for (const Matrix& factor : {left, right})
      if (refresh && factor) roots = std::max(roots, root_bytes(factor.rows, factor.dtype));
    return Undo::bytes({param, momentum, squares}) +
           Undo::bytes({left, right, left_root, right_root}) +
           std::max(increments + applying, roots);
  }
};

double trace(const Matrix& m) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows; i++) sum += element(m, i, i);
  return sum;
}

void set_identity(const Matrix& m, double value) {
  fill(m, 0);
  Matrix diagonal = m;
  diagonal.cols = 1;
  diagonal.row_stride += diagonal.col_stride;
  fill(diagonal, value);
}

class ShampooMatrix {
 public:
  ShampooMatrix(const ShampooStep& step, const Matrix& param, const Matrix& grad,
                const ShampooState& state, double t, int threads)
      : step_(step),
        param_(param),
        grad_(grad),
        state_(state),
        t_(t),
        threads_(threads),
        m_(grad.rows),
        n_(grad.cols),
        kind_(state.momentum.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32) {}

  // False if the matrix is skipped, with nothing written.
  bool run_step(bool refresh) {
    largest_ = max_abs(grad_, threads_);
    const bool outside =
        largest_ != 0 && (largest_ < 0x1p-50 || largest_ > 0x1p50);  // false for NaN
    if ((step_.roots.relative_ridge > 0 || step_.kl) && outside) return false;
    if (step_.check &&
        (std::isnan(largest_) || std::isnan(max_abs(state_.momentum, threads_)) || !squares_fit()))
      return false;
    // Without a refresh the factors come last, when it is known that they will be kept.
    const bool factors_last = !refresh && !(step_.kl && unstarted());
    const bool grafts = step_.kind != Graft::kNone && step_.kind != Graft::kSgd;
    Undo undo({param_, state_.momentum, grafts ? state_.squares : Matrix{}}, step_.check);
    Undo undo_factors({state_.left, state_.right, state_.left_root, state_.right_root},
                      step_.check && !factors_last);
    const int64_t failures[] = {state_.failures[0], state_.failures[1]};
    const auto before_factors = [&] { return !factors_last || applied(); };
    if (!(step_.kl ? update_kl(refresh, before_factors)
                   : update_factors(refresh, before_factors)) ||
        !(factors_last || applied())) {
      std::copy_n(failures, 2, state_.failures);
      return false;
    }
    undo.commit();
    undo_factors.commit();
    return true;
  }

 private:
  // Whether what apply() writes may stay: averages of finite numbers are finite, squares fit.
  bool applied() {
    apply();
    return !step_.check || all_finite({param_}, threads_);
  }

  bool squares_fit() const {
    if (step_.kind == Graft::kNone || step_.kind == Graft::kSgd) return true;
    const double most = kind_ == Kind::kF64 ? std::numeric_limits<double>::max()
                                            : double(std::numeric_limits<float>::max());
    return largest_ * largest_ + max_abs(state_.squares, threads_) <= most;  // false for NaN
  }

  // Both return false if the matrix is to be skipped: a factor does not fit, or `before` says so,
  // which is called before a factor is written.
  template <class F>
  bool update_factors(bool refresh, const F& before) {
    const Matrix &left = state_.left, &right = state_.right;
    if (left || right) {
      const Kind kind = factor_kind(grad_.dtype, (left ? left : right).dtype);
      Workspace workspace(panel_bytes(m_, n_, kind) + panel_bytes(n_, m_, kind));
      Pack pack;
      pack.x = grad_;
      if (right) pack.out = take_panels(workspace, m_, n_, kind);
      if (left) pack.out_t = take_panels(workspace, n_, m_, kind);
      run(pack, threads_);
      if (step_.check &&
          ((left && overflows(pack.out_t, largest_, step_.beta2, step_.weight(), left)) ||
           (right && overflows(pack.out, largest_, step_.beta2, step_.weight(), right))))
        return false;
      if (!before()) return false;
      if (left) accumulate(pack.out_t, step_.beta2, step_.weight(), left, threads_);
      if (right) accumulate(pack.out, step_.beta2, step_.weight(), right, threads_);
    } else if (!before()) {
      return false;
    }
    if (!refresh) return true;
    const double bias = step_.debias && step_.beta2 < 1 ? 1 - std::pow(step_.beta2, t_) : 1;
    take_root(left, state_.left_root, bias, 0);
    take_root(right, state_.right_root, bias, 1);
    return true;
  }

  void take_root(const Matrix& factor, const Matrix& root, double bias, int side) {
    if (!factor || max_abs(factor, threads_) == 0) return;
    // What stands there at first is no root, nor need it be one after a failure.
    const Matrix old = t_ > 1 && state_.failures[side] == 0 ? root : Matrix{};
    const RootResult result = inverse_root(factor, bias, step_.roots, old, root, false, threads_);
    if (result.status == RootStatus::kStagnated || result.status == RootStatus::kNonFinite)
      state_.failures[side]++;
  }

  template <class F>
  bool update_kl(bool refresh, const F& before) {
    const Matrix &left = state_.left, &right = state_.right;
    start_kl();
    const bool shorter_left = m_ <= n_, roots_between = refresh && step_.sequential();
    bool fits = true;
    if (roots_between) {
      for (const bool left_side : {shorter_left, !shorter_left}) {
        fits = fits && kl_increment(left_side, !left_side, before);
        if (fits)
          take_root(left_side ? left : right, left_side ? state_.left_root : state_.right_root, 1,
                    left_side ? 0 : 1);
      }
    } else {
      fits = kl_increment(true, true, before);
      if (fits && refresh) {
        take_root(left, state_.left_root, 1, 0);
        take_root(right, state_.right_root, 1, 1);
      }
    }
    if (!fits) return false;
    if (refresh) rebalance();
    return true;
  }

  bool unstarted() const {
    for (const Matrix& factor : {state_.left, state_.right})
      if (factor && max_abs(factor, threads_) != 0) return false;
    return true;
  }

  // Both factors lam0 I at the first gradient that is not zero.
  void start_kl() {
    if (!unstarted() || !(largest_ > 0)) return;
    std::vector<double> values(size_t(m_ * n_));
    copy_scaled(grad_, -exponent_of(largest_), Matrix{values.data(), m_, n_, n_, 1, DType::kF64});
    double sum = 0;
    for (double value : values) sum += value * value;
    const double lam0 = std::ldexp(std::sqrt(sum / double(m_ * n_)), exponent_of(largest_));
    const double delta = std::max(step_.roots.ridge, step_.roots.relative_ridge * lam0);
    for (const Matrix& factor : {state_.left, state_.right})
      if (factor) set_identity(factor, lam0);
    for (const Matrix& root : {state_.left_root, state_.right_root})
      if (root) set_identity(root, 1 / std::sqrt(lam0 + delta));
  }

  Panels packed(Workspace& workspace, const Matrix& root) {
    Pack pack;
    pack.x = root;
    pack.out = take_panels(workspace, root.rows, root.cols, kind_);
    run(pack, threads_);
    return pack.out;
  }

  // L <- beta2 L + w / n (G X_R)(G X_R)ᵀ and R likewise, as asked for, from the roots as they are.
  template <class F>
  bool kl_increment(bool of_left, bool of_right, const F& before) {
    const Matrix &left = state_.left, &right = state_.right;
    of_left = of_left && left;
    of_right = of_right && right;
    Workspace workspace(2 * (panel_bytes(m_, n_, kind_) + panel_bytes(n_, m_, kind_)) +
                        panel_bytes(m_, m_, kind_) + panel_bytes(n_, n_, kind_));
    Pack pack;
    pack.x = grad_;
    const Panels g = pack.out = take_panels(workspace, m_, n_, kind_);
    const Panels g_t = pack.out_t = take_panels(workspace, n_, m_, kind_);
    run(pack, threads_);
    Panels x_t = g_t, x = g;  // (G X_R)ᵀ and X_L G
    if (of_left && state_.right_root) {
      Product product;
      product.a = g_t;
      product.b = packed(workspace, state_.right_root);
      product.out_t = x_t = take_panels(workspace, n_, m_, kind_);
      run(product, threads_);
    }
    if (of_right && state_.left_root) {
      Product product;
      product.a = packed(workspace, state_.left_root);
      product.b = g;
      product.out = x = take_panels(workspace, m_, n_, kind_);
      run(product, threads_);
    }
    const double left_weight = step_.weight() / double(n_),
                 right_weight = step_.weight() / double(m_);
    const auto fits = [&](const Panels& panels, double weight, const Matrix& factor) {
      return !step_.check ||
             !overflows(panels, max_abs(flat(panels), threads_), step_.beta2, weight, factor);
    };
    if (of_left && !fits(x_t, left_weight, left)) return false;
    if (of_right && !fits(x, right_weight, right)) return false;
    if (!before()) return false;
    if (of_left) accumulate(x_t, step_.beta2, left_weight, left, threads_);
    if (of_right) accumulate(x, step_.beta2, right_weight, right, threads_);
    return true;
  }

  void rebalance() {
    const Matrix &left = state_.left, &right = state_.right;
    if (!left || !right) return;
    const double left_mean = trace(left) / double(m_), right_mean = trace(right) / double(n_);
    const auto usable = [](double mean) { return mean > 0 && std::isfinite(mean); };
    if (!usable(left_mean) || !usable(right_mean)) return;
    const double s = std::sqrt(left_mean / right_mean);
    scale_in_place(left, 1 / s);
    scale_in_place(right, s);
    scale_in_place(state_.left_root, std::sqrt(s));
    scale_in_place(state_.right_root, 1 / std::sqrt(s));
  }

  // Momentum, preconditioning, grafting, decay and update.
  void apply() {
    const TwoSidedShape shape{m_, n_, m_, n_, bool(state_.left_root), bool(state_.right_root)};
    const bool sides = shape.has_left || shape.has_right;
    Workspace workspace(2 * panel_bytes(m_, n_, kind_) + panel_bytes(n_, m_, kind_) +
                        panel_bytes(m_, m_, kind_) + panel_bytes(n_, n_, kind_) +
                        shape.workspace_bytes(kind_));
    const double mhat = step_.debias ? 1 / (1 - std::pow(step_.beta1, t_)) : 1;
    TwoSided operands;
    Pack moment;
    moment.x = grad_;
    moment.momentum = state_.momentum;
    moment.beta = step_.beta1;
    moment.negate = step_.maximize;
    if (!sides || shape.needs_x())
      moment.out = operands.x = take_panels(workspace, m_, n_, kind_);
    else
      moment.out_t = operands.x_t = take_panels(workspace, n_, m_, kind_);
    run(moment, threads_);
    // The roots are symmetric, so they are their own transposes.
    if (shape.has_left) operands.left_t = packed(workspace, state_.left_root);
    if (shape.has_right) operands.right = packed(workspace, state_.right_root);
    const double decay = 1 - step_.lr * step_.weight_decay;
    if (step_.kind == Graft::kNone && sides) {
      Product last;
      last.alpha = -step_.lr * mhat;
      last.beta = decay;
      last.add = last.store = param_;
      return precondition(shape, operands, last, workspace, threads_);
    }
    Panels p = operands.x;
    if (sides) {
      Product last;
      p = last.out = take_panels(workspace, m_, n_, kind_);
      precondition(shape, operands, last, workspace, threads_);
    }
    double scale = mhat;
    if (step_.kind != Graft::kNone) {
      const double length = std::sqrt(sum_of_squares(p, threads_));
      const double graft = graft_length(mhat);
      scale = length > 0 ? graft / length : (length == 0 ? 0 : length);
    }
    Combine move;
    move.a = p;
    move.alpha = -step_.lr * scale;
    move.delta = decay;
    move.add = move.store = param_;
    run(move, threads_);
  }

  // The length of the grafted method's update; its state takes this gradient.
  double graft_length(double mhat) {
    const double elements = double(m_ * n_);
    AdaptedLength length;
    length.m = state_.momentum;
    length.m_scale = mhat;
    if (step_.kind == Graft::kSgd) {
      Workspace workspace(panel_bytes(m_, n_, kind_));
      Pack pack;
      pack.x = state_.momentum;
      pack.out = take_panels(workspace, m_, n_, kind_);
      run(pack, threads_);
      return mhat * std::sqrt(sum_of_squares(pack.out, threads_));
    }
    SquareAverage average;
    average.g = grad_;
    average.v = state_.squares;
    const bool sum = step_.kind == Graft::kAdagrad;
    average.beta = sum ? 1 : step_.graft_beta2;
    average.weight = sum ? 1 : 1 - step_.graft_beta2;
    const double total = run(average, threads_);
    length.v = state_.squares;
    length.v_scale = step_.kind == Graft::kAdam ? 1 / (1 - std::pow(step_.graft_beta2, t_)) : 1;
    length.eps = step_.graft_eps;
    if (step_.relative_eps()) length.eps *= std::sqrt(total * length.v_scale / elements);
    return std::sqrt(run(length, threads_));
  }

  const ShampooStep& step_;
  const Matrix param_, grad_;
  const ShampooState state_;
  const double t_;
  const int threads_;
  const int64_t m_, n_;
  const Kind kind_;
  double largest_ = 0;
};

Graft graft_of(const std::string& name) {
  check_one_of(name, "graft", {"none", "sgd", "adagrad", "rmsprop", "adam"});
  if (name == "none") return Graft::kNone;
  if (name == "sgd") return Graft::kSgd;
  if (name == "adagrad") return Graft::kAdagrad;
  return name == "rmsprop" ? Graft::kRmsprop : Graft::kAdam;
}

void shampoo_step_(const ShampooLists& lists, const ShampooOptions& options) {
  count_call("shampoo_step_", "cpu");
  check_step(lists);
  check_moment(lists.momentum_buffers, "momentum_buffers", lists.params);
  check_factors(lists.lefts, "lefts", lists.params, 0);
  check_factors(lists.rights, "rights", lists.params, 1);
  check_factors(lists.left_roots, "left_roots", lists.params, 0);
  check_factors(lists.right_roots, "right_roots", lists.params, 1);
  check_partners(lists.lefts, "lefts", lists.left_roots, "left_roots");
  check_partners(lists.rights, "rights", lists.right_roots, "right_roots");
  const Graft kind = graft_of(options.graft);
  // A sum without decay would gather the errors of rounding.
  if (kind == Graft::kRmsprop || kind == Graft::kAdam)
    check_moment(lists.graft_squares, "graft_squares", lists.params);
  else
    check_state(lists.graft_squares, "graft_squares", lists.params, kind != Graft::kAdagrad);
  check_list(lists.root_failures, "root_failures", lists.params.size());
  for (size_t i = 0; i < lists.params.size(); i++) {
    auto expected = lists.params[i].sizes().vec();
    expected.pop_back();
    expected.back() = 2;
    CHECK_TYPE(lists.root_failures[i].scalar_type() == kLong, "root_failures must be int64, got ",
               lists.root_failures[i].scalar_type());
    CHECK_VALUE(lists.root_failures[i].device() == lists.params[i].device(), "root_failures[", i,
                "] is on ", lists.root_failures[i].device(), ", the other tensors are on ",
                lists.params[i].device());
    CHECK_VALUE(
        lists.root_failures[i].sizes() == expected && lists.root_failures[i].is_contiguous(),
        "root_failures[", i, "] must be contiguous, of shape ", IntArrayRef(expected), ", got ",
        lists.root_failures[i].sizes());
  }
  check_distinct({lists.params, lists.momentum_buffers, lists.lefts, lists.rights, lists.left_roots,
                  lists.right_roots, lists.graft_squares},
                 lists.grads);
  check_one_of(options.graft_eps_mode, "graft_eps_mode", {"relative", "absolute"});
  check_one_of(options.kl_order, "kl_order", {"sequential", "simultaneous"});
  CHECK_VALUE(!options.kl || options.root == 2,
              "kl weights its factors by inverse square roots: root must be 2, not ", options.root);
  CHECK_VALUE(options.refresh.size() == lists.params.size(), "refresh has ", options.refresh.size(),
              " entries, params has ", lists.params.size());
  const NonFinite policy = nonfinite_policy(options.nonfinite);
  const RootOptions roots{int(options.root), options.ridge, options.relative_ridge,
                          options.root_method};
  check_root_options(roots);
  const ShampooStep step{options, scalar(lists.lr), roots, kind, policy != NonFinite::kPropagate};
  const std::vector<Item> items = items_of(lists.params);
  if (policy == NonFinite::kRaise)
    raise_nonfinite(items, {{"grads", lists.grads},
                            {"momentum_buffers", lists.momentum_buffers},
                            {"lefts", lists.lefts},
                            {"rights", lists.rights},
                            {"left_roots", lists.left_roots},
                            {"right_roots", lists.right_roots},
                            {"graft_squares", lists.graft_squares},
                            {"params", lists.params}});
  const auto state_of = [&](const Item& item) {
    const size_t e = size_t(item.entry);
    return ShampooState{MatrixBatch(lists.momentum_buffers[e])[item.index],
                        optional_matrix(lists.lefts[e], item.index),
                        optional_matrix(lists.rights[e], item.index),
                        optional_matrix(lists.left_roots[e], item.index),
                        optional_matrix(lists.right_roots[e], item.index),
                        optional_matrix(lists.graft_squares[e], item.index),
                        lists.root_failures[e].data_ptr<int64_t>() + 2 * item.index};
  };
  std::vector<double> work;
  std::vector<size_t> bytes;
  for (const Item& item : items) {
    const size_t e = size_t(item.entry);
    const double m = double(lists.params[e].size(-2)), n = double(lists.params[e].size(-1));
    double sum = m * n;
    if (lists.lefts[e].numel() > 0)
      sum += (options.kl ? 2.5 : 1.5) * m * m * n +
             (options.refresh[e] != 0 ? root_work(int64_t(m), int(options.root)) : 0);
    if (lists.rights[e].numel() > 0)
      sum += (options.kl ? 2.5 : 1.5) * m * n * n +
             (options.refresh[e] != 0 ? root_work(int64_t(n), int(options.root)) : 0);
    work.push_back(sum);
    ShampooState state = state_of(item);
    const size_t copies = Widened::bytes({state.momentum, state.squares});
    state.momentum = in_full(state.momentum);
    state.squares = in_full(state.squares);
    bytes.push_back(state.bytes(MatrixBatch(lists.params[e])[item.index],
                                MatrixBatch(lists.grads[e])[item.index], options.refresh[e] != 0) +
                    copies);
  }
  Progress progress(lists.step_counts, lists.skipped);
  const auto update = [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    const size_t e = size_t(item.entry);
    ShampooState state = state_of(item);
    Widened wide({&state.momentum, &state.squares}, threads);
    const double count = progress.step(item);
    ShampooMatrix matrix(step, MatrixBatch(lists.params[e])[item.index],
                         MatrixBatch(lists.grads[e])[item.index], state, count + 1, threads);
    if (!matrix.run_step(options.refresh[e] != 0)) return progress.skip();
    wide.round_back(count);
    progress.updated(item);
  };
  parallel_matrices(work, update, bytes);
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("shampoo_step_", &boxed_step<ShampooLists, ShampooOptions, &shampoo_step_>);
}

}  // namespace spectral_kernels::cpu
