// kron_factors_update_ and kron_precondition on CUDA tensors.
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../../check_factors.h"
#include "../../counters.h"
#include "../base/list_step.h"
#include "../base/registration.h"
#include "../base/tensors.h"
#include "overflow.h"
#include "products.h"

namespace spectral_kernels::cuda {
namespace {

void kron_factors_update_(const at::Tensor& left, const at::Tensor& right, const at::Tensor& grad,
                          const at::Tensor& skipped, double beta, double weight,
                          const at::Tensor& left_root, const at::Tensor& right_root) {
  constexpr const char* kOp = "kron_factors_update_";
  count_call(kOp, "cuda");
  check_factors_update(left, right, grad, skipped, left_root, right_root);
  for (const at::Tensor& t : {left, right, grad, left_root, right_root}) check_not_double(t, kOp);
  if (grad.numel() == 0) return;
  const c10::DeviceGuard guard(grad.device());
  const int64_t count = leading(grad);

  std::vector<TwoSided> weighted;
  std::vector<Accumulate> factors;
  const auto add = [&](const at::Tensor& factor, const at::Tensor& root, bool rows) {
    if (factor.numel() == 0) return;
    Accumulate increment{grad, rows, factor, factor, beta, weight};
    if (root.numel() > 0) {
      increment.x =
          at::empty(grad.sizes(),
                    grad.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
      increment.weight /= double(grad.size(rows ? -1 : -2));
      const at::Tensor none;
      weighted.push_back({grad, rows ? none : root, rows ? root : none, increment.x});
    }
    factors.push_back(increment);
  };
  add(left, right_root, true);
  add(right, left_root, false);
  if (factors.empty()) return;
  if (!weighted.empty()) two_sided(weighted, kOp);

  const Accumulation accumulation(factors, kOp);
  void* stream = stream_of(grad);
  const at::Tensor overflow = at::zeros_like(accumulation.largest);
  check_launch(launch_overflow(accumulation.entries, accumulation.largest_bits(),
                               reinterpret_cast<uint32_t*>(overflow.data_ptr()), stream),
               kOp);
  // Both factors of a matrix are updated, or none.
  const int64_t sides = int64_t(factors.size());
  const at::Tensor largest = accumulation.largest.view({sides, count});
  largest.copy_(at::maximum(largest, overflow.view({sides, count}).amax({0}, true)));
  Counter counter;
  counter.count = count;
  check_launch(launch_count({counter}, NonFinite::kSkip, accumulation.largest_bits(),
                            static_cast<unsigned long long*>(skipped.data_ptr()), stream),
               kOp);
  accumulation.run(NonFinite::kSkip);
}

// `t` with zeros below and to the right.
at::Tensor extended(const at::Tensor& t, int64_t rows, int64_t columns) {
  if (t.numel() == 0) return t;
  auto sizes = t.sizes().vec();
  sizes[sizes.size() - 2] = rows;
  sizes[sizes.size() - 1] = columns;
  const at::Tensor out = at::zeros(sizes, t.options());
  out.narrow(-2, 0, t.size(-2)).narrow(-1, 0, t.size(-1)).copy_(t);
  return out;
}

at::Tensor kron_precondition(const at::Tensor& grad, const at::Tensor& left,
                             const at::Tensor& right) {
  constexpr const char* kOp = "kron_precondition";
  count_call(kOp, "cuda");
  const auto sizes = check_precondition(grad, left, right);
  for (const at::Tensor& t : {grad, left, right}) check_not_double(t, kOp);
  const c10::DeviceGuard guard(grad.device());
  if (left.numel() == 0 && right.numel() == 0) {
    const at::Tensor nan =
        at::scalar_tensor(std::numeric_limits<double>::quiet_NaN(), grad.options());
    return at::where(grad.isfinite().all(-1, true).all(-2, true), grad, nan);
  }
  const at::Tensor out =
      at::empty(sizes, grad.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const int64_t m = grad.size(-2), n = grad.size(-1), p = out.size(-2), q = out.size(-1);
  if (p == m && q == n) {
    two_sided({{grad, left, right, out}}, kOp);
    return out;
  }
  // Preconditioners are square; others are served all the same.
  const int64_t rows = std::max(m, p), columns = std::max(n, q);
  const at::Tensor x = extended(grad, rows, columns), found = at::zeros_like(x);
  two_sided({{x, extended(left, rows, rows), extended(right, columns, columns), found}}, kOp);
  return out.copy_(found.narrow(-2, 0, p).narrow(-1, 0, q));
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("kron_factors_update_", &kron_factors_update_);
  m.impl("kron_precondition", &kron_precondition);
}

}  // namespace spectral_kernels::cuda
