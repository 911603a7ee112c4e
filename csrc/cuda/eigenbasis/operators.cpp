// eigenbasis, refresh_eigenbasis and soap_step_ on CUDA tensors.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <string>
#include <tuple>

#include "../../check.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../base/registration.h"
#include "../base/tensors.h"
#include "eigenbasis_step.h"
#include "refresh.h"

namespace spectral_kernels::cuda {
namespace {

at::IntArrayRef values_shape(const at::Tensor& a) {
  return a.sizes().slice(0, size_t(a.dim() - 1));
}

void check_served(const at::Tensor& a, const char* name, const char* op) {
  check_full_precision(a, name);
  check_square(a, name);
  check_not_double(a, op);
}

std::tuple<at::Tensor, at::Tensor> eigenbasis(const at::Tensor& a) {
  constexpr const char* kOp = "eigenbasis";
  count_call(kOp, "cuda");
  check_served(a, "a", kOp);
  const c10::DeviceGuard guard(a.device());
  if (a.numel() == 0)
    return {at::empty(values_shape(a), a.options()),
            at::empty_like(a, at::MemoryFormat::Contiguous)};
  const Eigen found = eigen_of(a, kOp);
  return {found.values.to(at::kFloat).view(values_shape(a)),
          found.vectors.to(at::kFloat).view(a.sizes())};
}

std::tuple<at::Tensor, at::Tensor> refresh_eigenbasis(const at::Tensor& q, const at::Tensor& a,
                                                      bool sort) {
  constexpr const char* kOp = "refresh_eigenbasis";
  count_call(kOp, "cuda");
  check_served(q, "q", kOp);
  check_served(a, "a", kOp);
  check_same_shape(q, "q", a, "a");
  const c10::DeviceGuard guard(a.device());
  const at::Tensor values = at::empty(values_shape(a), a.options());
  const at::Tensor basis = at::empty_like(q, at::MemoryFormat::Contiguous);
  for (int64_t i = 0; a.numel() > 0 && i < leading(a); i++) {
    const Refreshed found = refreshed_basis(matrix_of(q, i), matrix_of(a, i), sort, kOp);
    values.view({-1, a.size(-1)})[i].copy_(found.values);
    matrix_of(basis, i).copy_(found.basis);
  }
  return {values, basis};
}

void soap_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList lefts, at::TensorList rights,
                at::TensorList left_bases, at::TensorList right_bases, at::TensorList step_counts,
                const at::Tensor& skipped, const at::Tensor& lr, double beta1, double beta2,
                double shampoo_beta, double eps, double weight_decay, bool correct_bias,
                bool normalize_grads, bool skip_first, bool permute_squares, bool maximize,
                c10::string_view nonfinite, at::IntArrayRef refresh) {
  constexpr const char* kOp = "soap_step_";
  count_call(kOp, "cuda");
  const EigenbasisLists lists{params,     grads,       exp_avgs,    exp_avg_sqs, lefts, rights,
                              left_bases, right_bases, step_counts, skipped,     lr,    refresh};
  lists.check(kOp);
  check_state(exp_avg_sqs, "exp_avg_sqs", params, false);
  check_distinct({params, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases}, grads);
  EigenbasisOptions options;
  options.shampoo_beta = shampoo_beta;
  options.idle_first = skip_first;
  options.permute_squares = permute_squares;
  options.normalize = normalize_grads;
  options.adam = {Average(beta1), Average(beta2), float(eps), maximize};
  options.schedule.beta1 = beta1;
  options.schedule.beta2 = beta2;
  options.schedule.weight_decay = weight_decay;
  options.schedule.correct_bias = correct_bias;
  options.schedule.decay_last = true;
  options.nonfinite = std::string(nonfinite);
  EigenbasisStep step(lists, options, kOp);
  if (step.empty()) return;
  const c10::DeviceGuard guard(params[0].device());
  step.begin();
  while (step.next_slice()) {
    step.rotate();
    check_launch(launch_adam(step.moment_entries(), options.adam, step.largest(), step.stream()),
                 kOp);
    step.finish();
  }
  step.count();
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("eigenbasis", &eigenbasis);
  m.impl("refresh_eigenbasis", &refresh_eigenbasis);
  m.impl("soap_step_", &soap_step_);
}

}  // namespace spectral_kernels::cuda
