// Polynomial iterations towards the polar factor and the fused Muon step.
//
// The matrix is oriented so that it is wide (s x l, s <= l), scaled by a power of two so that its
// largest element lies in [1, 2), and packed once, as X and as Xᵀ. Its norm comes from the diagonal
// of the first X Xᵀ and is folded into the first step's coefficients, so there is no pass for the
// norm and no division.
#include "newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../check.h"
#include "../counters.h"
#include "../registration.h"
#include "../step_calls.h"
#include "lapack.h"
#include "list_step.h"
#include "neurons.h"
#include "parallel.h"
#include "rounding.h"
#include "views.h"

namespace spectral_kernels::cpu {

NewtonSchulz::NewtonSchulz(ArrayRef<double> flat_rows, const std::string& method_,
                           IntArrayRef restarts_, ScalarType compute_dtype_, double eps_,
                           const std::string& norm, double norm_factor_)
    : method(method_),
      restarts(restarts_.begin(), restarts_.end()),
      compute_dtype(compute_dtype_),
      eps(eps_),
      schatten8(norm == "schatten8"),
      norm_factor(norm_factor_) {
  CHECK_VALUE(!flat_rows.empty() && flat_rows.size() % 3 == 0,
              "rows must hold a, b, c for every step, got ", flat_rows.size(), " numbers");
  for (size_t i = 0; i < flat_rows.size(); i += 3)
    rows.push_back({flat_rows[i], flat_rows[i + 1], flat_rows[i + 2]});
  check_one_of(method, "method", {"auto", "standard", "gram"});
  check_one_of(norm, "norm", {"frobenius", "schatten8"});
  CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and at least 0, got ", eps);
  CHECK_VALUE(norm_factor > 0 && std::isfinite(norm_factor),
              "norm_factor must be positive and finite, got ", norm_factor);
  dtype_of(compute_dtype);
}

Kind NewtonSchulz::kind() const {
  if (compute_dtype == kDouble) return Kind::kF64;
  if (compute_dtype == kBFloat16 && kernels().panel[int(Kind::kBF16)] != 0) return Kind::kBF16;
  return Kind::kF32;
}

namespace {

// Multiply-adds with one triangle of every symmetric product, 16-bit ones counted at the relative
// rate of their instructions.
struct Cost {
  double standard, gram;
};

// The step after the last one of the segment that begins with step t.
size_t segment_end(const NewtonSchulz& ns, size_t t) {
  do t++;
  while (t < ns.rows.size() && std::count(ns.restarts.begin(), ns.restarts.end(), int64_t(t)) == 0);
  return t;
}

Cost cost_of(const NewtonSchulz& ns, int64_t s, int64_t l) {
  const double square = double(s) * double(s) * double(s), wide = double(s) * double(s) * double(l);
  const bool pairs = ns.kind() == Kind::kBF16;
  const double rate = pairs ? kernels().pair_rate : 1;
  const auto step = [&](size_t t) {
    return (1.5 * wide + (ns.rows[t].c != 0 ? 0.5 * square : 0)) / rate;
  };
  Cost cost{0, 0};
  for (size_t t = 0; t < ns.rows.size(); t++) cost.standard += step(t);
  for (size_t t = 0, end; t < ns.rows.size(); t = end) {
    end = segment_end(ns, t);
    if (end - t == 1) {
      cost.gram += step(t);
      continue;
    }
    cost.gram += (pairs ? 2.5 : 1.5) * wide / rate;
    cost.gram += 1.5 * square * double(end - t - 1);  // Q Z, and R twice
    for (size_t i = t; i < end; i++) cost.gram += ns.rows[i].c != 0 ? 0.5 * square : 0;
  }
  return cost;
}

}  // namespace

bool NewtonSchulz::gram(int64_t s, int64_t l) const {
  if (method != "auto") return method == "gram";
  // In full precision the Gram form keeps the accuracy of the standard one only with restarts,
  // which are decided where the rows come from.
  const bool full = compute_dtype == kFloat || compute_dtype == kDouble;
  if (full && restarts.empty()) return false;
  const Cost cost = cost_of(*this, s, l);
  return cost.gram < cost.standard;
}

double NewtonSchulz::work(int64_t s, int64_t l) const {
  const Cost cost = cost_of(*this, s, l);
  return gram(s, l) ? cost.gram : cost.standard;
}

size_t NewtonSchulz::workspace_bytes(int64_t s, int64_t l) const {
  const Kind k = kind(), square = k == Kind::kF64 ? Kind::kF64 : Kind::kF32;
  const size_t x = panel_bytes(s, l, k) + panel_bytes(l, s, k, Held::kLeftToo);
  const size_t r = panel_bytes(s, s, square);
  const size_t extra = k != Kind::kBF16 ? 0
                                        : panel_bytes(s, s, k, Held::kLeftToo) +
                                              panel_bytes(s, s, k, Held::kLeftOnly);
  return 2 * x + (gram(s, l) ? 5 : schatten8 ? 3 : 2) * r + extra;
}

NewtonSchulz::Input NewtonSchulz::take_input(Workspace& workspace, int64_t s, int64_t l) const {
  return {take_panels(workspace, s, l, kind()),
          take_panels(workspace, l, s, kind(), Held::kLeftToo)};
}

namespace {

// alpha S B, S symmetric.
Product times(const Panels& s, const Panels& b, double alpha = 1) {
  Product p = multiply(s, s, b);
  p.alpha = alpha;
  return p;
}

// Everything one matrix needs while it is iterated on.
class Iteration {
 public:
  Iteration(const NewtonSchulz& ns, NewtonSchulz::Input input, int shift, Workspace& workspace,
            int threads)
      : ns_(ns),
        kind_(input.x.kind),
        pairs_(kind_ == Kind::kBF16),
        s_(input.x.rows),
        l_(input.x.cols),
        shift_(shift),
        threads_(threads),
        workspace_(workspace),
        x_(input) {}

  // The standard form takes every step by itself, the Gram form those between two restarts on R.
  void run_all(bool gram, Product last) {
    next_ = ns_.take_input(workspace_, s_, l_);
    r_ = full();
    z_ = full();
    r16_ = pairs_ ? halves(Held::kLeftToo) : r_;
    z16_ = pairs_ ? halves(Held::kLeftOnly) : z_;
    if (gram) {
      q_ = full();
      spare_ = full();
    }
    if (gram || ns_.schatten8) half_ = full();
    const size_t steps = ns_.rows.size();
    for (size_t t = 0, end; t < steps; t = end) {
      end = gram ? segment_end(ns_, t) : t + 1;
      const Product update = end - t == 1 ? step(t) : segment(t, end);
      if (end < steps)
        renew(update);
      else
        finish(update, last);
    }
  }

 private:
  // One step by itself: a X + (b R + c R²) X. Rows of X that are equal stay equal to the last bit,
  // so that no rounding noise enters the null space for later steps to amplify.
  Product step(size_t t) {
    // With 16-bit operands both terms of b R + c R² take the rounded R: near R = I their errors
    // cancel to (b + 2c) of the rounding. The fp32 R is needed for the norm only.
    if (!pairs_)
      form_gram(r_, Panels{});
    else if (t == 0)
      form_gram(r_, r16_);
    else
      form_gram(r16_, Panels{});
    NewtonSchulz::Row row = ns_.rows[t];
    if (t == 0) scale(row, inverse_norm(r_, r16_, half_));
    // a X stays a term of its own: a diagonal a I would swamp Z where the singular values are
    // small (measured in fp32 at 512: up to three times the error). A cubic row needs no square
    // at all.
    Product update = times(r16_, x_.x, row.b);
    if (row.c != 0) {
      form_polynomial(row.b, row.c, r16_, t == 0 && ns_.schatten8 ? half_ : Panels{}, z16_);
      update = times(z16_, x_.x);
    }
    update.beta_panels = row.a;
    update.add_panels = x_.x;
    return update;
  }

  // Several steps on R: Z = b R + c R², Q <- a Q + Q Z, R <- (a I + Z) R (a I + Z), a I implicit
  // but in the first Q; then Q X. R and Q are kept in full precision: rounded operands would no
  // longer commute, and rounding would grow with every step.
  Product segment(size_t begin, size_t end) {
    double inverse = 1;  // 1 / norm, until it has been folded into X
    form_gram(r_, Panels{});
    for (size_t t = begin; t < end; t++) {
      NewtonSchulz::Row row = ns_.rows[t];
      double gram_scale = 1;
      if (t == 0) {
        inverse = inverse_norm(r_, r_, half_);
        gram_scale = inverse * inverse;
        row.b *= gram_scale;
        row.c *= gram_scale * gram_scale;
      }
      if (row.c != 0)
        form_polynomial(row.b, row.c, r_, t == 0 && ns_.schatten8 ? half_ : Panels{}, z_);
      else
        combine(z_, r_, row.b, {}, 0, 0);
      if (t == begin) {
        combine(q_, z_, 1, {}, 0, row.a);
      } else {
        symmetric(q_, z_, 1, row.a, spare_);
        std::swap(q_, spare_);
      }
      if (t + 1 < end) {
        symmetric(r_, z_, gram_scale, row.a * gram_scale, half_);
        symmetric(half_, z_, 1, row.a, r_);
      }
    }
    if (!pairs_) return times(q_, x_.x, inverse);
    // On the null space Q is the product of the a, hundreds of times what it is on the rest, and X
    // is exactly 0 there where rows or columns repeat: one 16-bit Q would add the rounding of the
    // large part. Two of them hold 16 bits; what the low one adds may be rounded.
    const Panels high = r16_, low = z16_;
    combine(high, q_, 1, {}, 0, 0);
    combine(low, q_, 1, high, -1, 0);
    Product rest = times(low, x_.x, inverse);
    rest.out = next_.x;
    run(rest, threads_);
    Product update = times(high, x_.x, inverse);
    update.beta_panels = 1;
    update.add_panels = next_.x;
    return update;
  }

  Panels full() {
    return take_panels(workspace_, s_, s_, kind_ == Kind::kF64 ? Kind::kF64 : Kind::kF32);
  }
  Panels halves(Held held) { return take_panels(workspace_, s_, s_, Kind::kBF16, held); }

  void renew(Product form) {
    form.out = next_.x;
    form.out_t = next_.xt;
    run(form, threads_);
    std::swap(x_, next_);
  }

  void form_gram(const Panels& r, const Panels& copy) {
    Product p;
    p.a = p.b = x_.xt;
    p.a_t = x_.x;
    p.symmetric = true;
    p.out = r;
    p.copy = copy;
    run(p, threads_);
  }

  // out = alpha A B + beta A
  void symmetric(const Panels& a, const Panels& b, double alpha, double beta, const Panels& out) {
    Product p = times(a, b, alpha);
    p.symmetric = true;
    p.beta_panels = beta;
    p.add_panels = a;
    p.out = out;
    run(p, threads_);
  }

  void combine(const Panels& out, const Panels& a, double alpha, const Panels& b, double beta,
               double gamma) {
    run(Combine{a, b, out, {}, alpha, beta, gamma, 0, {}, {}}, threads_);
  }

  // out = b R + c R², from R² where that is known already.
  void form_polynomial(double b, double c, const Panels& r, const Panels& r2, const Panels& out) {
    if (r2) return combine(out, r2, c, r, b, 0);
    symmetric(r, r, c, b, out);
  }

  // 1 / the norm that X is divided by, 0 for X = 0 (a mix of gradient and momentum can cancel).
  // `r2` receives R² for the Schatten-8 norm.
  double inverse_norm(const Panels& r, const Panels& operand, const Panels& r2) {
    double value;
    if (ns_.schatten8) {
      Product p = times(operand, operand);
      p.symmetric = true;
      p.out = r2;
      run(p, threads_);
      value = std::pow(sum_of_squares(r2, threads_), 0.125);
    } else {
      value = std::sqrt(trace(r));
    }
    const double norm = std::max(ns_.norm_factor * value, std::ldexp(ns_.eps, shift_));
    return norm == 0 ? 0 : 1 / norm;
  }

  static void scale(NewtonSchulz::Row& row, double inverse) {
    row.a *= inverse;
    row.b *= inverse * inverse * inverse;
    row.c *= inverse * inverse * inverse * inverse * inverse;
  }

  // last(update): the result times last.alpha, plus what `last` adds itself.
  void finish(const Product& update, Product last) {
    last.a = update.a;
    last.a_t = update.a_t;
    last.b = update.b;
    last.add_panels = update.add_panels;
    last.beta_panels = last.alpha * update.beta_panels;
    last.alpha *= update.alpha;
    run(last, threads_);
  }

  const NewtonSchulz& ns_;
  const Kind kind_;
  const bool pairs_;  // 16-bit operands
  const int64_t s_, l_;
  const int shift_, threads_;
  Workspace& workspace_;
  NewtonSchulz::Input x_, next_;
  Panels r_, z_, half_, q_, spare_;
  Panels r16_, z16_;  // in the kind of X; Z is a left operand only
};

}  // namespace

void NewtonSchulz::iterate(Input input, int shift, Product last, Workspace& workspace,
                           int threads) const {
  Iteration(*this, input, shift, workspace, threads)
      .run_all(gram(input.x.rows, input.x.cols), last);
}

namespace {

// A wide view of the matrix: s x l with s <= l.
Matrix oriented(const Matrix& m) { return m.rows <= m.cols ? m : m.transposed(); }

void orthogonalize(const NewtonSchulz& ns, const Matrix& given, const Matrix& out, int threads) {
  const Matrix x = oriented(given);
  const double largest = max_abs(x, threads);
  if (largest == 0 || std::isnan(largest)) return fill(out, largest);
  Workspace workspace(ns.workspace_bytes(x.rows, x.cols));
  const NewtonSchulz::Input input = ns.take_input(workspace, x.rows, x.cols);
  Pack pack;
  pack.x = x;
  pack.shift = -exponent_of(largest);
  pack.out = input.x;
  pack.out_t = input.xt;
  run(pack, threads);
  Product last;
  last.store = given.rows <= given.cols ? out : out.transposed();
  ns.iterate(input, pack.shift, last, workspace, threads);
}

Tensor newton_schulz(const Tensor& x, const std::vector<double>& rows, const std::string& method,
                     const std::vector<int64_t>& restarts, ScalarType compute_dtype, double eps,
                     const std::string& norm, double norm_factor) {
  count_call("newton_schulz", "cpu");
  check_matrix(x, "x");
  const NewtonSchulz ns(rows, method, restarts, compute_dtype, eps, norm, norm_factor);
  Tensor out = empty(x.sizes(), x);
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const double work = ns.work(std::min(xs.rows(), xs.cols()), std::max(xs.rows(), xs.cols()));
  parallel_matrices(std::vector<double>(size_t(xs.count()), work),
                    [&](int64_t i, int threads) { orthogonalize(ns, xs[i], outs[i], threads); });
  return out;
}

Tensor polar(const Tensor& x) {
  count_call("polar", "cpu");
  check_matrix(x, "x");
  Tensor out = empty(x.sizes(), x);
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const int64_t m = xs.rows(), n = xs.cols();
  const double eps = x.scalar_type() == kDouble ? std::numeric_limits<double>::epsilon()
                                                : double(std::numeric_limits<float>::epsilon());
  const double threshold = double(std::max(m, n)) * eps;
  lapack_jobs("svd", xs.count(), [&](int64_t i) {
    const double largest = max_abs(xs[i], 1);
    if (largest == 0 || std::isnan(largest)) {
      fill(outs[i], largest);
      return true;
    }
    std::vector<double> matrix(size_t(m * n)), result(size_t(m * n));
    const Matrix scaled{matrix.data(), m, n, n, 1, DType::kF64};
    copy_scaled(xs[i], -exponent_of(largest), scaled);
    const bool converged = svd_polar(m, n, matrix.data(), threshold, result.data());
    if (converged)
      copy_scaled(Matrix{result.data(), m, n, n, 1, DType::kF64}, 0, outs[i]);
    else
      fill(outs[i], std::numeric_limits<double>::quiet_NaN());
    return converged;
  });
  return out;
}

struct MuonStep : MuonOptions {
  double lr;

  // Whether the update takes more than a multiple of the parameter and one of the polar factor.
  bool by_rows() const {
    return beta2.has_value() || hyperball || (cautious && lr * weight_decay != 0);
  }
};

// Scratch of muon_update().
size_t muon_bytes(const NewtonSchulz& ns, const MuonStep& step, const Matrix& momentum) {
  const int64_t m = momentum.rows, n = momentum.cols;
  const size_t iteration = Workspace::rounded(ns.workspace_bytes(std::min(m, n), std::max(m, n)));
  return iteration + (step.by_rows() ? neuron_bytes(m, n, ns.compute_dtype == kDouble) : 0) +
         (momentum.dtype == DType::kBF16 ? wide_bytes(momentum) : 0);
}

// One matrix: momentum while packing, all Newton–Schulz steps, decay and update in the last
// product's epilogue, or in a pass over its result where that goes by rows. Gradient and momentum
// are read twice, once for their scale; the parameter is read once. Non-finite input (`largest` is
// NaN) goes into the momentum as the formula says, and the whole update of that matrix is NaN.
// Momentum in bfloat16 is widened before and rounded after, at random: `count` steps are behind it.
void muon_update(const NewtonSchulz& ns, const MuonStep& step, const Matrix& param,
                 const Matrix& grad, const Matrix& momentum, const Matrix& second, double largest,
                 double scale, double count, int threads) {
  const bool wide = param.rows <= param.cols;
  const auto orient = [&](const Matrix& m) { return wide ? m : m.transposed(); };
  const Matrix g = orient(grad), w = orient(param);
  Workspace workspace(muon_bytes(ns, step, momentum));
  const NewtonSchulz::Input input = ns.take_input(workspace, g.rows, g.cols);
  const bool narrow = momentum.dtype == DType::kBF16;
  const Matrix full = narrow ? take_wide(workspace, momentum) : momentum;
  if (narrow) widen(momentum, full, threads);
  Pack pack;
  pack.x = g;
  pack.shift = std::isnan(largest) ? 0 : -exponent_of(largest);
  pack.momentum = orient(full);
  pack.beta = step.momentum;
  pack.nesterov = step.nesterov;
  pack.negate = step.maximize;
  pack.out = input.x;
  pack.out_t = input.xt;
  run(pack, threads);
  if (narrow) round_at_random(full, uint64_t(count), momentum, threads);
  if (std::isnan(largest)) {
    if (second) fill(second, largest);
    return fill(param, largest);
  }
  Product last;
  if (!step.by_rows()) {
    last.alpha = -step.lr * scale;
    last.beta = 1 - step.lr * step.weight_decay;
    last.add = last.store = w;
    return ns.iterate(input, pack.shift, last, workspace, threads);
  }
  NeuronStep rows{param, second};
  rows.rate = step.lr * scale;
  rows.decay = step.lr * step.weight_decay;
  rows.cautious = step.cautious;
  rows.hyperball = step.hyperball;
  if (step.hyperball) rows.rate = step.lr;  // the update's length is the parameter's
  rows.beta2 = step.beta2.value_or(0);
  rows.eps = step.neuron_eps;
  const Matrix o = take_neurons(workspace, rows, ns.compute_dtype == kDouble);
  last.store = orient(o);
  ns.iterate(input, pack.shift, last, workspace, threads);
  run(rows, threads);
}

void muon_step_(const MuonLists& lists, const MuonOptions& options) {
  count_call("muon_step_", "cpu");
  check_step(lists);
  check_moment(lists.momentum_buffers, "momentum_buffers", lists.params);
  CHECK_VALUE(!options.hyperball || options.weight_decay == 0,
              "a hyperball undoes weight decay: weight_decay must be 0, got ",
              options.weight_decay);
  check_rows_state(lists.second_moments, "second_moments", lists.params, options.beta2.has_value());
  check_distinct({lists.params, lists.momentum_buffers, lists.second_moments}, lists.grads);
  CHECK_VALUE(options.scales.size() == lists.params.size(), "scales has ", options.scales.size(),
              " entries, params has ", lists.params.size());
  const NonFinite policy = nonfinite_policy(options.nonfinite);
  const MuonStep step{options, scalar(lists.lr)};
  std::vector<Item> items = items_of(lists.params);
  check_restart_ends(options.restarts, options.restart_ends, lists.params.size());
  std::vector<NewtonSchulz> iterations;  // one an entry
  for (size_t i = 0; i < lists.params.size(); i++) {
    // One rule for every dtype of parameter, fp64 excepted, which is always computed in itself.
    const bool wide = lists.params[i].scalar_type() == kDouble;
    iterations.emplace_back(options.rows, options.method, options.restarts_of(i),
                            wide ? kDouble : options.compute_dtype, options.eps, options.norm,
                            options.norm_factor);
  }
  const bool check = policy != NonFinite::kPropagate;
  const auto written = [&](const Item& item) {
    const size_t e = size_t(item.entry);
    return std::tuple(MatrixBatch(lists.params[e])[item.index],
                      MatrixBatch(lists.momentum_buffers[e])[item.index],
                      optional_matrix(lists.second_moments[e], item.index));
  };
  std::vector<double> work;
  std::vector<size_t> bytes;
  for (const Item& item : items) {
    const auto [param, buffer, second] = written(item);
    const NewtonSchulz& ns = iterations[size_t(item.entry)];
    work.push_back(ns.work(std::min(param.rows, param.cols), std::max(param.rows, param.cols)));
    bytes.push_back(muon_bytes(ns, step, buffer) +
                    (check ? Undo::bytes({param, buffer, second}) : 0));
  }
  const auto largest_of = [&](const Item& item, int threads) {
    const double g = max_abs(MatrixBatch(lists.grads[size_t(item.entry)])[item.index], threads);
    const double m =
        max_abs(MatrixBatch(lists.momentum_buffers[size_t(item.entry)])[item.index], threads);
    return std::isnan(g) || std::isnan(m) ? std::numeric_limits<double>::quiet_NaN()
                                          : std::max(g, m);
  };
  if (policy == NonFinite::kRaise)
    raise_nonfinite(items, {{"grads", lists.grads},
                            {"momentum_buffers", lists.momentum_buffers},
                            {"second_moments", lists.second_moments},
                            {"params", lists.params}});
  Progress progress(lists.step_counts, lists.skipped);
  const auto update = [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    const size_t e = size_t(item.entry);
    const auto [param, buffer, second] = written(item);
    const Matrix grad = MatrixBatch(lists.grads[e])[item.index];
    const double largest = largest_of(item, threads);
    if (check && (std::isnan(largest) || !all_finite({second}, 1))) return progress.skip();
    Undo undo({param, buffer, second}, check);
    if (largest == 0) {
      // No direction disagrees with the parameter.
      if (second) scale_in_place(second, *step.beta2);
      scale_in_place(param, 1 - step.lr * step.weight_decay);
    } else {
      muon_update(iterations[e], step, param, grad, buffer, second, largest, options.scales[e],
                  progress.step(item), threads);
    }
    if (check && !all_finite({param}, threads)) return progress.skip();
    undo.commit();
    progress.updated(item);
  };
  parallel_matrices(work, update, bytes);
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("newton_schulz", &boxed<&newton_schulz>);
  m.impl("polar", &boxed<&polar>);
  m.impl("muon_step_", &boxed_step<MuonLists, MuonOptions, &muon_step_>);
}

}  // namespace spectral_kernels::cpu
