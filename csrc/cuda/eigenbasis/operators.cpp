// eigenbasis, refresh_eigenbasis and soap_step_ on CUDA tensors.

#include <string>
#include <tuple>

#include "../../check.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/tensors.h"
#include "../base/torch_ops.h"
#include "eigenbasis_step.h"
#include "refresh.h"

namespace spectral_kernels::cuda {
namespace {

IntArrayRef values_shape(const Tensor& a) { return a.sizes().slice(0, size_t(a.dim() - 1)); }

void check_served(const Tensor& a, const char* name, const char* op) {
  check_full_precision(a, name);
  check_square(a, name);
  check_not_double(a, op);
}

std::tuple<Tensor, Tensor> eigenbasis(const Tensor& a) {
  constexpr const char* kOp = "eigenbasis";
  count_call(kOp, "cuda");
  check_served(a, "a", kOp);
  const DeviceGuard guard(a.device());
  if (a.numel() == 0) return {empty(values_shape(a), a), empty_as(a)};
  const Eigen found = eigen_of(a, kOp);
  return {viewed(converted(found.values, kFloat), values_shape(a)),
          viewed(converted(found.vectors, kFloat), a.sizes())};
}

std::tuple<Tensor, Tensor> refresh_eigenbasis(const Tensor& q, const Tensor& a, bool sort) {
  constexpr const char* kOp = "refresh_eigenbasis";
  count_call(kOp, "cuda");
  check_served(q, "q", kOp);
  check_served(a, "a", kOp);
  check_same_shape(q, "q", a, "a");
  const DeviceGuard guard(a.device());
  const Tensor values = empty(values_shape(a), a);
  const Tensor basis = empty_as(q);
  for (int64_t i = 0; a.numel() > 0 && i < leading(a); i++) {
    const Refreshed found = refreshed_basis(matrix_of(q, i), matrix_of(a, i), sort, kOp);
    select(viewed(values, {-1, a.size(-1)}), 0, i).copy_(found.values);
    matrix_of(basis, i).copy_(found.basis);
  }
  return {values, basis};
}

void soap_step_(const BasisLists& lists, const SoapOptions& options) {
  constexpr const char* kOp = "soap_step_";
  count_call(kOp, "cuda");
  check_lists(lists, kOp);
  check_state(lists.exp_avg_sqs, "exp_avg_sqs", lists.params, false);
  check_eigenbasis_distinct(lists, true);
  EigenbasisOptions basis(options);
  basis.idle_first = options.skip_first;
  basis.permute_squares = options.permute_squares;
  basis.schedule.correct_bias = options.correct_bias;
  basis.schedule.decay_last = true;
  EigenbasisStep step(lists, basis, kOp);
  step.run([&] {
    check_launch(launch_adam(step.moment_entries(), basis.adam, step.largest(), step.stream()),
                 kOp);
  });
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("eigenbasis", &boxed<&eigenbasis>);
  m.impl("refresh_eigenbasis", &boxed<&refresh_eigenbasis>);

  m.impl("soap_step_", &boxed_step<BasisLists, SoapOptions, &soap_step_>);
}

}  // namespace spectral_kernels::cuda
