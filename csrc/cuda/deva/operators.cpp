// deva_step_ on CUDA tensors.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <string>
#include <vector>

#include "../../check_deva.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../base/registration.h"
#include "../base/tensors.h"
#include "../eigenbasis/eigenbasis_step.h"
#include "../newton_schulz/orthogonalize.h"
#include "passes.h"

namespace spectral_kernels::cuda {
namespace {

// Directions of one slice, from G' on.
class Directions {
 public:
  Directions(const EigenbasisStep& step, const char* op) : step_(step), op_(op) {
    for (const MomentEntry& a : step.moment_entries()) entries_.push_back({a});
    const DevaSizes sizes = place_varied(entries_);
    const auto options = step.options();
    tiles_ = at::empty({sizes.tiles + sizes.shares}, options.dtype(at::kDouble));
    floats_ = at::empty({2 * sizes.lines + 2 * step.matrices()}, options.dtype(at::kFloat));
    arrived_ = at::zeros({step.matrices()}, options.dtype(at::kInt));
    buffers_.tiles = tiles_.data_ptr<double>();
    buffers_.shares = buffers_.tiles + sizes.tiles;
    buffers_.lines = reinterpret_cast<Line*>(floats_.data_ptr<float>());
    buffers_.eps = floats_.data_ptr<float>() + 2 * sizes.lines;
    buffers_.arrived = reinterpret_cast<uint32_t*>(arrived_.data_ptr());
    buffers_.numbers = step.numbers();
    buffers_.largest = step.largest();
  }

  void schatten(const Deva& deva, at::ArrayRef<double> rows, at::ScalarType compute_dtype) {
    void* stream = step_.stream();
    check_launch(launch_moments(entries_, deva, buffers_, stream), op_);
    if (deva.has_energies()) check_launch(launch_energies(entries_, deva, buffers_, stream), op_);
    orthogonalize(step_.directions(), rows, compute_dtype, op_);
    check_launch(launch_adaptation(entries_, deva, buffers_, stream), op_);
  }

  void signs(const Deva& deva) {
    if (deva.relative && deva.has_energies())
      check_launch(launch_mean(entries_, deva, buffers_, step_.stream()), op_);
    check_launch(launch_signs(entries_, deva, buffers_, step_.stream()), op_);
  }

 private:
  const EigenbasisStep& step_;
  const char* op_;
  std::vector<Varied> entries_;
  at::Tensor tiles_, floats_, arrived_;
  DevaBuffers buffers_;
};

void deva_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList lefts, at::TensorList rights,
                at::TensorList left_bases, at::TensorList right_bases, at::TensorList step_counts,
                const at::Tensor& skipped, const at::Tensor& lr, double beta1, double beta2,
                double shampoo_beta, double eps, c10::string_view eps_mode, double weight_decay,
                c10::string_view norm, c10::string_view variance, bool nesterov, bool sign,
                bool correct_bias, bool normalize_grads, at::ArrayRef<double> rows,
                at::ArrayRef<double> scales, at::ScalarType compute_dtype, bool reference,
                bool maximize, c10::string_view nonfinite, at::IntArrayRef refresh) {
  constexpr const char* kOp = "deva_step_";
  count_call(kOp, "cuda");
  const EigenbasisLists lists{params,     grads,       exp_avgs,    exp_avg_sqs, lefts, rights,
                              left_bases, right_bases, step_counts, skipped,     lr,    refresh};
  lists.check(kOp);
  Deva deva;
  deva.variance = check_deva(params, exp_avg_sqs, scales, std::string(eps_mode), std::string(norm),
                             std::string(variance), reference);
  const bool schatten = norm == "schatten", none = deva.variance == Variance::kNone;
  if (none)
    check_distinct({params, exp_avgs, lefts, rights, left_bases, right_bases}, grads);
  else
    check_distinct({params, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases}, grads);
  deva.adam = {Average(beta1), Average(beta2), float(eps), maximize};
  deva.nesterov = nesterov;
  deva.sign = sign;
  deva.relative = eps_mode == "relative";
  deva.outside = eps_mode == "outside";
  EigenbasisOptions options;
  options.squares = none                                    ? Squares::kNone
                    : deva.variance == Variance::kLowMemory ? Squares::kLine
                                                            : Squares::kMatrix;
  options.new_squares = !none;
  options.bounded = !reference && deva.relative;
  options.scales = scales;
  options.shampoo_beta = shampoo_beta;
  options.idle_first = options.permute_squares = reference && schatten;
  options.normalize = normalize_grads;
  options.adam = deva.adam;
  options.schedule.beta1 = beta1;
  options.schedule.beta2 = beta2;
  options.schedule.weight_decay = weight_decay;
  options.schedule.debias = correct_bias && !reference;
  options.schedule.correct_bias = correct_bias && reference && schatten;
  options.schedule.decay_last = reference && schatten;
  options.nonfinite = std::string(nonfinite);
  EigenbasisStep step(lists, options, kOp);
  if (step.empty()) return;
  const c10::DeviceGuard guard(params[0].device());
  step.begin();
  while (step.next_slice()) {
    step.rotate();
    if (!step.moment_entries().empty()) {
      Directions directions(step, kOp);
      if (schatten)
        directions.schatten(deva, rows, compute_dtype);
      else
        directions.signs(deva);
    }
    step.finish();
  }
  step.count();
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) { m.impl("deva_step_", &deva_step_); }

}  // namespace spectral_kernels::cuda
