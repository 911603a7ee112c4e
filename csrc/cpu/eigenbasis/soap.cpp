// The fused SOAP step. reference/eigenbasis.py is the specification.
#include <torch/library.h>

#include <cmath>

#include "../../check.h"
#include "../../counters.h"
#include "../list_step.h"
#include "../parallel.h"
#include "../views.h"
#include "eigenbasis_step.h"

namespace spectral_kernels::cpu {
namespace {

struct SoapStep {
  double lr, beta1, beta2, shampoo_beta, eps, weight_decay;
  bool correct_bias, normalize_grads, skip_first, permute_squares, maximize, check;
};

enum class Outcome { kSkipped, kIdle, kUpdated };

// The matrices of one parameter.
struct SoapMatrix {
  Matrix param, grad, moment, squares;
  Sides sides;

  // Scratch for U and its transpose.
  size_t extra() const {
    const Kind kind = moment.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
    return panel_bytes(grad.rows, grad.cols, kind) + panel_bytes(grad.cols, grad.rows, kind);
  }
  size_t bytes(bool refresh) const {
    return EigenbasisStep::bytes(grad, moment, sides, extra(), 0, refresh) +
           Undo::bytes({param, moment, squares}) + sides_bytes(sides);
  }
};

Outcome soap_update(const SoapStep& step, const SoapMatrix& matrix, double t, bool refresh,
                    int threads) {
  const auto& [param, grad, moment, squares, sides] = matrix;
  EigenbasisStep rotated(grad, step.maximize, moment, sides, step.shampoo_beta, matrix.extra(),
                         threads);
  if (step.check && !rotated.finite_input()) return Outcome::kSkipped;
  const bool first = rotated.uninitialised();
  rotated.pack_gradient();
  Undo undo({param, moment, squares}, step.check && !(first && step.skip_first));
  Undo undo_sides({sides.left, sides.right, sides.left_basis, sides.right_basis},
                  step.check && (first || refresh));
  if (first && !rotated.initialise(step.check)) return Outcome::kSkipped;
  if (first && step.skip_first) {
    if (step.check && !all_finite({moment, squares}, threads)) return Outcome::kSkipped;
    undo_sides.commit();
    return Outcome::kIdle;
  }
  const Panels g = rotated.rotated();
  if (step.check && !(rotated.squares_fit(g) && (first || rotated.factors_fit())))
    return Outcome::kSkipped;
  AdamMoments adam;
  adam.g = g;
  adam.m = moment;
  adam.v = squares;
  adam.beta1 = step.beta1;
  adam.beta2 = step.beta2;
  adam.eps = step.eps;
  const bool transposed = rotated.wants_transposed();
  Panels& u = transposed ? adam.out_t : adam.out;
  u = transposed ? rotated.take_transposed() : g;
  run(adam, threads);
  const double bias = step.correct_bias
                          ? std::sqrt(1 - std::pow(step.beta2, t)) / (1 - std::pow(step.beta1, t))
                          : 1;
  const double decay = 1 - step.lr * step.weight_decay;
  rotated.move(u, param, decay * step.lr * bias, decay, step.normalize_grads, rotated.kind());
  // The moment is an average of finite numbers; factors fit.
  if (step.check && !all_finite({param, squares}, threads)) return Outcome::kSkipped;
  if (!first) {
    rotated.accumulate();
    if (refresh) rotated.refresh(squares, step.permute_squares);
    if (step.check && refresh && !all_finite({moment}, threads)) return Outcome::kSkipped;
  }
  undo.commit();
  undo_sides.commit();
  return Outcome::kUpdated;
}

void soap_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList lefts, at::TensorList rights,
                at::TensorList left_bases, at::TensorList right_bases, at::TensorList step_counts,
                const at::Tensor& skipped, const at::Tensor& lr, double beta1, double beta2,
                double shampoo_beta, double eps, double weight_decay, bool correct_bias,
                bool normalize_grads, bool skip_first, bool permute_squares, bool maximize,
                c10::string_view nonfinite, at::IntArrayRef refresh) {
  count_call("soap_step_", "cpu");
  check_step(params, grads, step_counts, skipped, lr);
  check_state(exp_avgs, "exp_avgs", params, false);
  check_state(exp_avg_sqs, "exp_avg_sqs", params, false);
  check_eigenbasis_lists(params, lefts, rights, left_bases, right_bases, refresh);
  check_distinct({params, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases}, grads);
  const NonFinite policy = nonfinite_policy(std::string(nonfinite));
  const SoapStep step{scalar(lr), beta1,           beta2,        shampoo_beta,
                      eps,        weight_decay,    correct_bias, normalize_grads,
                      skip_first, permute_squares, maximize,     policy != NonFinite::kPropagate};
  const std::vector<Item> items = items_of(params);
  if (policy == NonFinite::kRaise)
    raise_nonfinite(items, {{"grads", grads},
                            {"exp_avgs", exp_avgs},
                            {"exp_avg_sqs", exp_avg_sqs},
                            {"lefts", lefts},
                            {"rights", rights},
                            {"left_bases", left_bases},
                            {"right_bases", right_bases},
                            {"params", params}});
  const auto matrix_of = [&](const Item& item) {
    const size_t e = size_t(item.entry);
    return SoapMatrix{MatrixBatch(params[e])[item.index], MatrixBatch(grads[e])[item.index],
                      MatrixBatch(exp_avgs[e])[item.index], MatrixBatch(exp_avg_sqs[e])[item.index],
                      sides_of(item, lefts, rights, left_bases, right_bases)};
  };
  std::vector<size_t> bytes;
  for (const Item& item : items)
    bytes.push_back(matrix_of(item).bytes(refresh[size_t(item.entry)] != 0));
  Progress progress(step_counts, skipped);
  const auto update = [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    const Outcome outcome = soap_update(step, matrix_of(item), progress.step(item) + 1,
                                        refresh[size_t(item.entry)] != 0, threads);
    if (outcome == Outcome::kSkipped)
      progress.skip();
    else if (outcome == Outcome::kUpdated)
      progress.updated(item);
  };
  parallel_matrices(eigenbasis_work(items, params, lefts, rights, refresh), update, bytes);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) { m.impl("soap_step_", &soap_step_); }

}  // namespace spectral_kernels::cpu
