// newton_schulz and muon_step_ on CUDA tensors.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <string>
#include <vector>

#include "../../check.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../base/registration.h"
#include "../base/tensors.h"
#include "plan.h"

namespace spectral_kernels::cuda {
namespace {

at::Tensor newton_schulz(const at::Tensor& x, at::ArrayRef<double> rows, c10::string_view method,
                         at::IntArrayRef restarts, at::ScalarType compute_dtype, double eps,
                         c10::string_view norm, double norm_factor) {
  constexpr const char* kOp = "newton_schulz";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  const c10::DeviceGuard guard(x.device());
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  check_not_double(x, kOp);
  Lists lists(plan, x);
  lists.add(x, {}, out, 1, restarts);
  lists.run(stream_of(x));
  return out;
}

void muon_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                at::TensorList second_moments, at::TensorList step_counts,
                const at::Tensor& skipped, const at::Tensor& lr, double momentum, bool nesterov,
                std::optional<double> beta2, double /*neuron_eps*/, double weight_decay,
                bool cautious, bool hyperball, at::ArrayRef<double> rows,
                at::ArrayRef<double> scales, c10::string_view method, at::IntArrayRef restarts,
                at::IntArrayRef restart_ends, at::ScalarType compute_dtype, double eps,
                c10::string_view norm, double norm_factor, bool maximize,
                c10::string_view nonfinite) {
  constexpr const char* kOp = "muon_step_";
  count_call(kOp, "cuda");
  check_step(params, grads, step_counts, skipped, lr);
  check_state(momentum_buffers, "momentum_buffers", params, false);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !beta2.has_value() && !cautious && !hyperball, kOp,
      ": the CUDA C++ kernels have no second moments of neurons, no cautious weight decay and no "
      "hyperball");
  check_rows_state(second_moments, "second_moments", params, false);
  check_distinct({params, momentum_buffers}, grads);
  TORCH_CHECK_VALUE(scales.size() == params.size(), "scales has ", scales.size(),
                    " entries, params has ", params.size());
  const std::string policy(nonfinite);
  check_one_of(policy, "nonfinite", {"skip", "propagate", "raise"});
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  check_restart_ends(restarts, restart_ends, params.size());
  if (params.empty()) return;
  const c10::DeviceGuard guard(params[0].device());
  Lists lists(plan, params[0]);
  std::vector<Counter> counters;
  int64_t matrices = 0;
  for (size_t i = 0; i < params.size(); i++) {
    if (params[i].numel() == 0) continue;
    counters.push_back(counter_of(step_counts[i], matrices, leading(params[i])));
    matrices += leading(params[i]);
    check_not_double(params[i], kOp);
    const int64_t begin = i == 0 || restart_ends.empty() ? 0 : restart_ends[i - 1];
    const int64_t end = restart_ends.empty() ? 0 : restart_ends[i];
    lists.add(grads[i], momentum_buffers[i], params[i], float(scales[i]),
              restarts.slice(size_t(begin), size_t(end - begin)));
  }
  if (lists.entries.empty()) return;
  lists.place();
  Scratch& scratch = *lists.scratch;
  void* stream = stream_of(params[0]);

  Prologue prologue;
  prologue.nesterov = nesterov;
  prologue.maximize = maximize;
  prologue.momentum = Average(momentum);
  prologue.nonfinite = policy == "skip" ? NonFinite::kSkip : NonFinite::kPropagate;
  prologue.f16 = plan.f16;
  prologue.planes = plan.planes;
  Update update;
  update.in_place = true;
  update.weight_decay = float(weight_decay);
  update.nonfinite = prologue.nonfinite;
  at::Tensor rate;  // kept alive until the kernels are launched
  if (lr.is_cpu()) {
    update.lr = lr.scalar_type() == at::kFloat ? *lr.const_data_ptr<float>()
                                               : float(*lr.const_data_ptr<double>());
  } else {
    rate = lr.to(at::kFloat);
    update.device_lr = rate.const_data_ptr<float>();
  }

  if (policy == "raise") {
    raise_nonfinite(lists.entries, params, "momentum_buffers", scratch.largest_bits(), kOp);
    raise_nonfinite(params, "params", kOp);
  } else {
    const Of of = policy == "skip" ? Of::kAll : Of::kBoth;
    check_launch(launch_largest(lists.entries, of, scratch.largest(), stream), kOp);
    if (rate.defined() && policy == "skip")
      scratch.largest_bits().masked_fill_(at::isfinite(rate.view({})).logical_not(),
                                          int32_t(kRefused));
  }
  check_launch(launch_prologue(lists.entries, prologue, scratch.largest(), scratch.buffers.packed,
                               scratch.norms, stream),
               kOp);
  lists.iterate(update, stream);
  check_launch(launch_count(counters, update.nonfinite, scratch.largest(),
                            static_cast<unsigned long long*>(skipped.data_ptr()), stream),
               kOp);
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("newton_schulz", &newton_schulz);
  m.impl("muon_step_", &muon_step_);
}

}  // namespace spectral_kernels::cuda
