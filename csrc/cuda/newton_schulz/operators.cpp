// newton_schulz and muon_step_ on CUDA tensors.

#include <optional>
#include <string>
#include <vector>

#include "../../check.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/tensors.h"
#include "../base/torch_ops.h"
#include "plan.h"

namespace spectral_kernels::cuda {
namespace {

Tensor newton_schulz(const Tensor& x, const std::vector<double>& rows, const std::string& method,
                     const std::vector<int64_t>& restarts, ScalarType compute_dtype, double eps,
                     const std::string& norm, double norm_factor) {
  constexpr const char* kOp = "newton_schulz";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  const DeviceGuard guard(x.device());
  Tensor out = empty(x.sizes(), x);
  if (out.numel() == 0) return out;
  check_not_double(x, kOp);
  Lists lists(plan, x);
  lists.add(x, {}, out, 1, restarts);
  lists.run(stream_of(x));
  return out;
}

void muon_step_(const MuonLists& lists, const MuonOptions& options) {
  constexpr const char* kOp = "muon_step_";
  count_call(kOp, "cuda");
  check_step(lists);
  check_state(lists.momentum_buffers, "momentum_buffers", lists.params, false);
  CHECK_IMPLEMENTED(
      !options.beta2.has_value() && !options.cautious && !options.hyperball, kOp,
      ": the CUDA C++ kernels have no second moments of neurons, no cautious weight decay and no "
      "hyperball");
  check_rows_state(lists.second_moments, "second_moments", lists.params, false);
  check_distinct({lists.params, lists.momentum_buffers}, lists.grads);
  CHECK_VALUE(options.scales.size() == lists.params.size(), "scales has ", options.scales.size(),
              " entries, params has ", lists.params.size());
  const std::string& policy = options.nonfinite;
  check_one_of(policy, "nonfinite", {"skip", "propagate", "raise"});
  const Plan plan(options.rows, options.method, options.compute_dtype, options.eps, options.norm,
                  options.norm_factor, kOp);
  check_restart_ends(options.restarts, options.restart_ends, lists.params.size());
  if (lists.params.empty()) return;
  const DeviceGuard guard(lists.params[0].device());
  Lists served(plan, lists.params[0]);
  std::vector<Counter> counters;
  int64_t matrices = 0;
  for (size_t i = 0; i < lists.params.size(); i++) {
    if (lists.params[i].numel() == 0) continue;
    counters.push_back(counter_of(lists.step_counts[i], matrices, leading(lists.params[i])));
    matrices += leading(lists.params[i]);
    check_not_double(lists.params[i], kOp);
    served.add(lists.grads[i], lists.momentum_buffers[i], lists.params[i], float(options.scales[i]),
               options.restarts_of(i));
  }
  if (served.entries.empty()) return;
  served.place();
  Scratch& scratch = *served.scratch;
  void* stream = stream_of(lists.params[0]);

  Update update;
  update.in_place = true;
  update.weight_decay = float(options.weight_decay);
  const bool skips = policy != "propagate";
  if (skips) {
    update.nonfinite = NonFinite::kSkip;
    update.targets = scratch.targets();
    update.most = served.most();
  }
  Tensor rate;  // kept alive until the kernels are launched
  if (lists.lr.is_cpu()) {
    update.lr = lists.lr.scalar_type() == kFloat ? *lists.lr.const_data_ptr<float>()
                                                 : float(*lists.lr.const_data_ptr<double>());
  } else {
    rate = converted(lists.lr, kFloat);
    update.device_lr = rate.const_data_ptr<float>();
  }
  Prologue prologue;
  prologue.nesterov = options.nesterov;
  prologue.maximize = options.maximize;
  prologue.momentum = Average(options.momentum);
  prologue.update = update;
  prologue.f16 = plan.f16;
  prologue.planes = plan.planes;

  if (policy == "raise") {
    raise_nonfinite(served.entries, lists.params, "momentum_buffers", scratch.largest_bits(), kOp);
    raise_nonfinite(lists.params, "params", kOp);
  }
  check_launch(launch_largest(served.entries, skips ? Of::kAll : Of::kBoth, scratch.largest(),
                              stream, scratch.targets()),
               kOp);
  check_launch(launch_prologue(served.entries, prologue, scratch.largest(), scratch.buffers.packed,
                               scratch.norms, stream),
               kOp);
  served.iterate(update, stream);
  if (skips)
    check_launch(launch_momentum(served.entries, prologue, scratch.largest(), stream), kOp);
  check_launch(launch_count(counters, update.nonfinite, scratch.largest(),
                            static_cast<unsigned long long*>(lists.skipped.data_ptr()), stream),
               kOp);
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("newton_schulz", &boxed<&newton_schulz>);
  m.impl("muon_step_", &boxed_step<MuonLists, MuonOptions, &muon_step_>);
}

}  // namespace spectral_kernels::cuda
