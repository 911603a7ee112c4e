// The fused SOAP step. reference/eigenbasis.py is the specification.

#include <cmath>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../../step_calls.h"
#include "../list_step.h"
#include "../parallel.h"
#include "../rounding.h"
#include "../views.h"
#include "eigenbasis_step.h"

namespace spectral_kernels::cpu {
namespace {

struct SoapStep : SoapOptions {
  double lr;
  bool check;  // what is not finite
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

void soap_step_(const BasisLists& lists, const SoapOptions& options) {
  count_call("soap_step_", "cpu");
  check_step(lists);
  check_moment(lists.exp_avgs, "exp_avgs", lists.params);
  check_moment(lists.exp_avg_sqs, "exp_avg_sqs", lists.params);
  check_eigenbasis_lists(lists);
  check_eigenbasis_distinct(lists, true);
  const NonFinite policy = nonfinite_policy(options.nonfinite);
  const SoapStep step{options, scalar(lists.lr), policy != NonFinite::kPropagate};
  const std::vector<Item> items = items_of(lists.params);
  if (policy == NonFinite::kRaise) raise_nonfinite(items, lists, lists.exp_avg_sqs);
  const auto matrix_of = [&](const Item& item) {
    const size_t e = size_t(item.entry);
    return SoapMatrix{MatrixBatch(lists.params[e])[item.index],
                      MatrixBatch(lists.grads[e])[item.index],
                      MatrixBatch(lists.exp_avgs[e])[item.index],
                      MatrixBatch(lists.exp_avg_sqs[e])[item.index], sides_of(item, lists)};
  };
  std::vector<size_t> bytes;
  for (const Item& item : items) {
    SoapMatrix matrix = matrix_of(item);
    const size_t copies = Widened::bytes({matrix.moment, matrix.squares});
    matrix.moment = in_full(matrix.moment);
    matrix.squares = in_full(matrix.squares);
    bytes.push_back(matrix.bytes(lists.refresh[size_t(item.entry)] != 0) + copies);
  }
  Progress progress(lists.step_counts, lists.skipped);
  const auto update = [&](int64_t i, int threads) {
    const Item& item = items[size_t(i)];
    SoapMatrix matrix = matrix_of(item);
    Widened wide({&matrix.moment, &matrix.squares}, threads);
    const double count = progress.step(item);
    const Outcome outcome =
        soap_update(step, matrix, count + 1, lists.refresh[size_t(item.entry)] != 0, threads);
    if (outcome == Outcome::kSkipped) return progress.skip();
    wide.round_back(count);
    if (outcome == Outcome::kUpdated) progress.updated(item);
  };
  parallel_matrices(eigenbasis_work(items, lists), update, bytes);
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("soap_step_", &boxed_step<BasisLists, SoapOptions, &soap_step_>);
}

}  // namespace spectral_kernels::cpu
