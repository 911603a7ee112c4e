// Polynomial iterations towards the polar factor and the fused Muon step.
//
// The matrix is oriented so that it is wide (s x l, s <= l), scaled by a power of two so that its
// largest element lies in [1, 2), and packed once, as X and as Xᵀ. Its norm comes from the diagonal
// of the first X Xᵀ and is folded into the first step's coefficients, so there is no pass for the
// norm and no division.
#include "newton_schulz.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../check.h"
#include "../counters.h"
#include "lapack.h"
#include "list_step.h"
#include "parallel.h"
#include "views.h"

namespace spectral_kernels::cpu {

NewtonSchulz::NewtonSchulz(at::ArrayRef<double> flat_rows, const std::string& method_,
                           at::IntArrayRef restarts_, at::ScalarType compute_dtype_, double eps_,
                           const std::string& norm, double norm_factor_)
    : method(method_),
      restarts(restarts_.begin(), restarts_.end()),
      compute_dtype(compute_dtype_),
      eps(eps_),
      schatten8(norm == "schatten8"),
      norm_factor(norm_factor_) {
  TORCH_CHECK_VALUE(!flat_rows.empty() && flat_rows.size() % 3 == 0,
                    "rows must hold a, b, c for every step, got ", flat_rows.size(), " numbers");
  for (size_t i = 0; i < flat_rows.size(); i += 3)
    rows.push_back({flat_rows[i], flat_rows[i + 1], flat_rows[i + 2]});
  check_one_of(method, "method", {"auto", "standard", "gram"});
  check_one_of(norm, "norm", {"frobenius", "schatten8"});
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and at least 0, got ", eps);
  TORCH_CHECK_VALUE(norm_factor > 0 && std::isfinite(norm_factor),
                    "norm_factor must be positive and finite, got ", norm_factor);
  dtype_of(compute_dtype);
}

Kind NewtonSchulz::kind() const {
  if (compute_dtype == at::kDouble) return Kind::kF64;
  if (compute_dtype == at::kBFloat16 && kernels().panel[int(Kind::kBF16)] != 0) return Kind::kBF16;
  return Kind::kF32;
}

namespace {

// Multiply-adds with one triangle of every symmetric product, 16-bit ones counted at the relative
// rate of their instructions.
struct Cost {
  double standard, gram;
};

constexpr double kPairRate = 2;  // bf16 dot products against fp32 FMA (measured on Zen 5: 2.0)

Cost cost_of(const NewtonSchulz& ns, int64_t s, int64_t l) {
  const double square = double(s) * double(s) * double(s), wide = double(s) * double(s) * double(l);
  const double rate = ns.kind() == Kind::kBF16 ? kPairRate : 1;
  Cost cost{0, 0};
  const int64_t steps = int64_t(ns.rows.size());
  bool fresh = true;  // no Q yet
  for (int64_t t = 0; t < steps; t++) {
    const bool quintic = ns.rows[size_t(t)].c != 0;
    cost.standard += (1.5 * wide + (quintic ? 0.5 * square : 0)) / rate;
    const bool restart = std::count(ns.restarts.begin(), ns.restarts.end(), t) > 0 && t > 0;
    const bool next = std::count(ns.restarts.begin(), ns.restarts.end(), t + 1) > 0;
    if (restart) {
      cost.gram += 1.5 * wide / rate;
      fresh = true;
    }
    if (quintic) cost.gram += 0.5 * square;
    if (!fresh) cost.gram += 0.5 * square / rate;
    if (t + 1 < steps && !next) cost.gram += square;
    fresh = false;
  }
  cost.gram += 1.5 * wide / rate;
  return cost;
}

}  // namespace

bool NewtonSchulz::gram(int64_t s, int64_t l) const {
  if (method != "auto") return method == "gram";
  // The Gram form keeps the accuracy of the standard one only with restarts that are known for the
  // rows (decided where the rows come from).
  if (restarts.empty()) return false;
  const Cost cost = cost_of(*this, s, l);
  return cost.gram < cost.standard;
}

double NewtonSchulz::work(int64_t s, int64_t l) const {
  const Cost cost = cost_of(*this, s, l);
  return gram(s, l) ? cost.gram : cost.standard;
}

size_t NewtonSchulz::workspace_bytes(int64_t s, int64_t l) const {
  const Kind k = kind(), square = k == Kind::kF64 ? Kind::kF64 : Kind::kF32;
  const size_t x = panel_bytes(s, l, k) + panel_bytes(l, s, k), r = panel_bytes(s, s, square);
  const size_t extra = k == Kind::kBF16 ? panel_bytes(s, s, k) : 0;
  if (gram(s, l)) return x * (restarts.empty() ? 1 : 2) + 5 * r + 3 * extra;
  return 2 * x + (schatten8 ? 3 : 2) * r + 2 * extra;
}

NewtonSchulz::Input NewtonSchulz::take_input(Workspace& workspace, int64_t s, int64_t l) const {
  return {take_panels(workspace, s, l, kind()), take_panels(workspace, l, s, kind())};
}

namespace {

Product multiply(const Panels& a, const Panels& b, double alpha = 1) {
  Product p;
  p.a = a;
  p.b = b;
  p.alpha = alpha;
  return p;
}

Product square(const Panels& a, double alpha = 1) {
  Product p = multiply(a, a, alpha);
  p.symmetric = true;
  return p;
}

// Everything one matrix needs while it is iterated on.
class Iteration {
 public:
  Iteration(const NewtonSchulz& ns, NewtonSchulz::Input input, int shift, Workspace& workspace,
            int threads)
      : ns_(ns),
        kind_(input.x.kind),
        s_(input.x.rows),
        l_(input.x.cols),
        shift_(shift),
        threads_(threads),
        workspace_(workspace),
        x_(input) {}

  void standard(Product last) {
    const bool pairs = kind_ == Kind::kBF16;
    NewtonSchulz::Input next = ns_.take_input(workspace_, s_, l_);
    const Panels r = full(), z = pairs ? halves() : full();
    const Panels r16 = pairs ? halves() : r;
    const Panels r2 = ns_.schatten8 ? full() : Panels{};
    const size_t steps = ns_.rows.size();
    for (size_t t = 0; t < steps; t++) {
      // With 16-bit operands both terms of b R + c R² take the rounded R: near R = I their errors
      // cancel to (b + 2c) of the rounding. The fp32 R is needed for the norm only.
      if (!pairs)
        form_gram(r, Panels{});
      else if (t == 0)
        form_gram(r, r16);
      else
        form_gram(r16, Panels{});
      double inverse = 1;
      NewtonSchulz::Row row = ns_.rows[t];
      if (t == 0) {
        inverse = inverse_norm(r, r16, r2);
        scale(row, inverse);
      }
      // a X stays a term of its own: a diagonal a I would swamp Z where the singular values are
      // small (measured in fp32 at 512: up to three times the error). A cubic row needs no square
      // at all.
      Product update = multiply(r16, x_.x, row.b);
      if (row.c != 0) {
        form_polynomial(0, row.b, row.c, r16, t == 0 ? r2 : Panels{}, z);
        update = multiply(z, x_.x);
      }
      update.beta_panels = row.a;
      update.add_panels = x_.x;
      if (t + 1 < steps) {
        update.out = next.x;
        update.out_t = next.xt;
        run(update, threads_);
        std::swap(x_, next);
      } else {
        finish(update, last);
      }
    }
  }

  // Below a 16-bit X, R and Q are kept in fp32. Rounded operands are good enough for Q Z, but not
  // for R and Z: they would no longer commute, and rounding would grow with every step.
  void gram(Product last) {
    const bool pairs = kind_ == Kind::kBF16;
    NewtonSchulz::Input next;
    if (!ns_.restarts.empty()) next = ns_.take_input(workspace_, s_, l_);
    Panels r = full(), z = full(), t1 = full(), q = full(), q2 = full();
    const Panels z16 = pairs ? halves() : z;
    Panels q16 = pairs ? halves() : Panels{}, next_q16 = pairs ? halves() : Panels{};
    const size_t steps = ns_.rows.size();
    double inverse = 1;  // 1 / norm, until it has been folded into X
    bool fresh = true;   // no Q yet
    form_gram(r, Panels{});
    for (size_t t = 0; t < steps; t++) {
      const bool ends = t + 1 == steps;
      const bool restart_next = !ends && restarts_at(t + 1);
      NewtonSchulz::Row row = ns_.rows[t];
      double gram_scale = 1;
      if (t == 0) {
        inverse = inverse_norm(r, r, t1);
        gram_scale = inverse * inverse;
        row.b *= gram_scale;
        row.c *= gram_scale * gram_scale;
      }
      // Z = b R + c R²; Q <- a Q + Q Z, R <- (a I + Z) R (a I + Z), a I implicit but in a fresh Q.
      if (row.c != 0)
        form_polynomial(0, row.b, row.c, r, t == 0 && ns_.schatten8 ? t1 : Panels{}, z);
      else
        combine(z, r, row.b, {}, 0, 0);
      if (pairs) combine(z16, z, 1, {}, 0, 0);
      if (fresh && restart_next) {  // one step by itself: X <- a X + Z X, as in the standard form
        Product update = multiply(z16, x_.x, inverse);
        update.beta_panels = row.a * inverse;
        update.add_panels = x_.x;
        renew(update, next, r);
        inverse = 1;
        continue;
      }
      if (fresh) {
        combine(q, z, 1, {}, 0, row.a);
        if (pairs) combine(q16, q, 1, {}, 0, 0);
      } else {
        Product update = multiply(pairs ? q16 : q, z16);
        update.symmetric = true;
        update.beta_panels = row.a;
        update.add_panels = q;
        update.out = q2;
        update.copy = next_q16;
        run(update, threads_);
        std::swap(q, q2);
        std::swap(q16, next_q16);
      }
      if (restart_next) {
        renew(multiply(pairs ? q16 : q, x_.x, inverse), next, r);
        inverse = 1;
        fresh = true;
        continue;
      }
      if (!ends) {
        symmetric(r, z, gram_scale, row.a * gram_scale, t1);
        symmetric(t1, z, 1, row.a, r);
      }
      fresh = false;
    }
    finish(multiply(pairs ? q16 : q, x_.x, inverse), last);
  }

 private:
  Panels full() {
    return take_panels(workspace_, s_, s_, kind_ == Kind::kF64 ? Kind::kF64 : Kind::kF32);
  }
  Panels halves() { return take_panels(workspace_, s_, s_, Kind::kBF16); }

  bool restarts_at(size_t t) const {
    return std::count(ns_.restarts.begin(), ns_.restarts.end(), int64_t(t)) > 0;
  }

  // A restart: X and R anew.
  void renew(Product form, NewtonSchulz::Input& next, const Panels& r) {
    form.out = next.x;
    form.out_t = next.xt;
    run(form, threads_);
    std::swap(x_, next);
    form_gram(r, Panels{});
  }

  void form_gram(const Panels& r, const Panels& copy) {
    Product p = square(x_.xt);
    p.out = r;
    p.copy = copy;
    run(p, threads_);
  }

  // out = alpha A B + beta A
  void symmetric(const Panels& a, const Panels& b, double alpha, double beta, const Panels& out) {
    Product p = multiply(a, b, alpha);
    p.symmetric = true;
    p.beta_panels = beta;
    p.add_panels = a;
    p.out = out;
    run(p, threads_);
  }

  void combine(const Panels& out, const Panels& a, double alpha, const Panels& b, double beta,
               double gamma) {
    Combine c;
    c.out = out;
    c.a = a;
    c.alpha = alpha;
    c.b = b;
    c.beta = beta;
    c.gamma = gamma;
    run(c, threads_);
  }

  // out = a I + b R + c R², from R² where that is known already.
  void form_polynomial(double a, double b, double c, const Panels& r, const Panels& r2,
                       const Panels& out) {
    if (r2) return combine(out, r2, c, r, b, a);
    Product p = square(r, c);
    p.beta_panels = b;
    p.add_panels = r;
    p.gamma = a;
    p.out = out;
    run(p, threads_);
  }

  // 1 / the norm that X is divided by, 0 for X = 0 (a mix of gradient and momentum can cancel).
  // `r2` receives R² for the Schatten-8 norm.
  double inverse_norm(const Panels& r, const Panels& operand, const Panels& r2) {
    double value;
    if (ns_.schatten8) {
      Product p = square(operand);
      p.out = r2;
      run(p, threads_);
      value = std::pow(sum_of_squares(r2, threads_), 0.125);
    } else {
      value = std::sqrt(trace(r));
    }
    const double norm = std::max(ns_.norm_factor * value, std::ldexp(ns_.eps, shift_));
    return norm > 0 ? 1 / norm : 0;
  }

  static void scale(NewtonSchulz::Row& row, double inverse) {
    row.a *= inverse;
    row.b *= inverse * inverse * inverse;
    row.c *= inverse * inverse * inverse * inverse * inverse;
  }

  // last(update): the result times last.alpha, plus what `last` adds itself.
  void finish(const Product& update, Product last) {
    last.a = update.a;
    last.b = update.b;
    last.add_panels = update.add_panels;
    last.beta_panels = last.alpha * update.beta_panels;
    last.alpha *= update.alpha;
    run(last, threads_);
  }

  const NewtonSchulz& ns_;
  const Kind kind_;
  const int64_t s_, l_;
  const int shift_, threads_;
  Workspace& workspace_;
  NewtonSchulz::Input x_;
};

}  // namespace

void NewtonSchulz::iterate(Input input, int shift, Product last, Workspace& workspace,
                           int threads) const {
  Iteration iteration(*this, input, shift, workspace, threads);
  if (gram(input.x.rows, input.x.cols))
    iteration.gram(last);
  else
    iteration.standard(last);
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

at::Tensor newton_schulz(const at::Tensor& x, at::ArrayRef<double> rows, c10::string_view method,
                         at::IntArrayRef restarts, at::ScalarType compute_dtype, double eps,
                         c10::string_view norm, double norm_factor) {
  count_call("newton_schulz", "cpu");
  check_matrix(x, "x");
  const NewtonSchulz ns(rows, std::string(method), restarts, compute_dtype, eps, std::string(norm),
                        norm_factor);
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const double work = ns.work(std::min(xs.rows(), xs.cols()), std::max(xs.rows(), xs.cols()));
  parallel_matrices(std::vector<double>(size_t(xs.count()), work),
                    [&](int64_t i, int threads) { orthogonalize(ns, xs[i], outs[i], threads); });
  return out;
}

at::Tensor polar(const at::Tensor& x) {
  count_call("polar", "cpu");
  check_matrix(x, "x");
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const int64_t m = xs.rows(), n = xs.cols();
  const double eps = x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                    : double(std::numeric_limits<float>::epsilon());
  const double threshold = double(std::max(m, n)) * eps;
  lapack_jobs(xs.count(), [&](int64_t i) {
    const double largest = max_abs(xs[i], 1);
    if (largest == 0 || std::isnan(largest)) return fill(outs[i], largest);
    std::vector<double> matrix(size_t(m * n)), result(size_t(m * n));
    const Matrix scaled{matrix.data(), m, n, n, 1, DType::kF64};
    copy_scaled(xs[i], -exponent_of(largest), scaled);
    const bool converged = svd_polar(m, n, matrix.data(), threshold, result.data());
    if (!converged) return fill(outs[i], std::numeric_limits<double>::quiet_NaN());
    copy_scaled(Matrix{result.data(), m, n, n, 1, DType::kF64}, 0, outs[i]);
  });
  return out;
}

struct MuonStep {
  double lr, momentum, weight_decay;
  bool nesterov, maximize;
};

// One matrix: momentum while packing, all Newton–Schulz steps, decay and update in the last
// product's epilogue. Gradient and momentum are read twice, once for their scale; the parameter is
// read once. Non-finite input (`largest` is NaN) goes into the momentum as the formula says, and
// the whole update of that matrix is NaN.
void muon_update(const NewtonSchulz& ns, const MuonStep& step, const Matrix& param,
                 const Matrix& grad, const Matrix& momentum, double largest, double scale,
                 int threads) {
  const bool wide = param.rows <= param.cols;
  const auto orient = [&](const Matrix& m) { return wide ? m : m.transposed(); };
  const Matrix g = orient(grad), w = orient(param);
  Workspace workspace(ns.workspace_bytes(g.rows, g.cols));
  const NewtonSchulz::Input input = ns.take_input(workspace, g.rows, g.cols);
  Pack pack;
  pack.x = g;
  pack.shift = std::isnan(largest) ? 0 : -exponent_of(largest);
  pack.momentum = orient(momentum);
  pack.beta = step.momentum;
  pack.nesterov = step.nesterov;
  pack.negate = step.maximize;
  pack.out = input.x;
  pack.out_t = input.xt;
  run(pack, threads);
  if (std::isnan(largest)) return fill(param, largest);
  Product last;
  last.alpha = -step.lr * scale;
  last.beta = 1 - step.lr * step.weight_decay;
  last.add = last.store = w;
  ns.iterate(input, pack.shift, last, workspace, threads);
}

void muon_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                at::TensorList step_counts, const at::Tensor& skipped, const at::Tensor& lr,
                double momentum, bool nesterov, double weight_decay, at::ArrayRef<double> rows,
                at::ArrayRef<double> scales, c10::string_view method, at::IntArrayRef restarts,
                at::IntArrayRef restart_ends, at::ScalarType compute_dtype, double eps,
                c10::string_view norm, double norm_factor, bool maximize,
                c10::string_view nonfinite) {
  count_call("muon_step_", "cpu");
  check_step(params, grads, step_counts, skipped, lr);
  check_state(momentum_buffers, "momentum_buffers", params, false);
  check_distinct({params, momentum_buffers}, grads);
  TORCH_CHECK_VALUE(scales.size() == params.size(), "scales has ", scales.size(),
                    " entries, params has ", params.size());
  const NonFinite policy = nonfinite_policy(std::string(nonfinite));
  const MuonStep step{scalar(lr), momentum, weight_decay, nesterov, maximize};
  std::vector<Item> items = items_of(params);
  check_restart_ends(restarts, restart_ends, params.size());
  std::vector<NewtonSchulz> iterations;  // one an entry
  for (size_t i = 0; i < params.size(); i++) {
    const int64_t first = i == 0 || restart_ends.empty() ? 0 : restart_ends[i - 1];
    const int64_t past = restart_ends.empty() ? 0 : restart_ends[i];
    // One rule for every dtype of parameter, fp64 excepted, which is always computed in itself.
    const bool wide = params[i].scalar_type() == at::kDouble;
    iterations.emplace_back(
        rows, std::string(method), restarts.slice(size_t(first), size_t(past - first)),
        wide ? at::kDouble : compute_dtype, eps, std::string(norm), norm_factor);
  }
  std::vector<double> work;
  for (const Item& item : items) {
    const at::Tensor& p = params[size_t(item.entry)];
    const int64_t s = std::min(p.size(-2), p.size(-1)), l = std::max(p.size(-2), p.size(-1));
    work.push_back(iterations[size_t(item.entry)].work(s, l));
  }
  const auto largest_of = [&](const Item& item, int threads) {
    const double g = max_abs(MatrixBatch(grads[size_t(item.entry)])[item.index], threads);
    const double m =
        max_abs(MatrixBatch(momentum_buffers[size_t(item.entry)])[item.index], threads);
    return std::isnan(g) || std::isnan(m) ? std::numeric_limits<double>::quiet_NaN()
                                          : std::max(g, m);
  };
  if (policy == NonFinite::kRaise)
    raise_nonfinite(items, {{"grads", grads}, {"momentum_buffers", momentum_buffers}});
  Progress progress(step_counts, skipped);
  parallel_matrices(work, [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    const size_t e = size_t(item.entry);
    const Matrix param = MatrixBatch(params[e])[item.index],
                 grad = MatrixBatch(grads[e])[item.index];
    const Matrix buffer = MatrixBatch(momentum_buffers[e])[item.index];
    const double largest = largest_of(item, threads);
    if (std::isnan(largest) && policy == NonFinite::kSkip) return progress.skip();
    if (largest == 0) {
      scale_in_place(param, 1 - step.lr * step.weight_decay);
    } else {
      muon_update(iterations[e], step, param, grad, buffer, largest, scales[e], threads);
    }
    progress.updated(item);
  });
  progress.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) {
  m.impl("newton_schulz", &newton_schulz);
  m.impl("polar", &polar);
  m.impl("muon_step_", &muon_step_);
}

}  // namespace spectral_kernels::cpu
