// kron_factors_update_ and kron_precondition on CUDA tensors.

#include <algorithm>
#include <limits>
#include <vector>

#include "../../check_factors.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/list_step.h"
#include "../base/tensors.h"
#include "../base/torch_ops.h"
#include "overflow.h"
#include "products.h"

namespace spectral_kernels::cuda {
namespace {

void kron_factors_update_(const Tensor& left, const Tensor& right, const Tensor& grad,
                          const Tensor& skipped, double beta, double weight,
                          const Tensor& left_root, const Tensor& right_root) {
  constexpr const char* kOp = "kron_factors_update_";
  count_call(kOp, "cuda");
  check_factors_update(left, right, grad, skipped, left_root, right_root);
  for (const Tensor& t : {left, right, grad, left_root, right_root}) check_not_double(t, kOp);
  if (grad.numel() == 0) return;
  const DeviceGuard guard(grad.device());
  const int64_t count = leading(grad);

  std::vector<TwoSided> weighted;
  std::vector<Accumulate> factors;
  const auto add = [&](const Tensor& factor, const Tensor& root, bool rows) {
    if (factor.numel() == 0) return;
    Accumulate increment{grad, rows, factor, factor, beta, weight};
    if (root.numel() > 0) {
      increment.x = empty(grad.sizes(), grad, kFloat);
      increment.weight /= double(grad.size(rows ? -1 : -2));
      const Tensor none;
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
  const Tensor overflow = zeros(accumulation.largest.sizes(), accumulation.largest, kInt);
  check_launch(launch_overflow(accumulation.entries, accumulation.largest_bits(),
                               reinterpret_cast<uint32_t*>(overflow.data_ptr()), stream),
               kOp);
  // Both factors of a matrix are updated, or none.
  const int64_t sides = int64_t(factors.size());
  const Tensor largest = viewed(accumulation.largest, {sides, count});
  const Tensor over = called<Tensor>("aten::amax", "", viewed(overflow, {sides, count}),
                                     std::vector<int64_t>{0}, true);
  largest.copy_(called<Tensor>("aten::maximum", "", largest, over));
  Counter counter;
  counter.count = count;
  check_launch(launch_count({counter}, NonFinite::kSkip, accumulation.largest_bits(),
                            static_cast<unsigned long long*>(skipped.data_ptr()), stream),
               kOp);
  accumulation.run(NonFinite::kSkip);
}

// `t` with zeros below and to the right.
Tensor extended(const Tensor& t, int64_t rows, int64_t columns) {
  if (t.numel() == 0) return t;
  auto sizes = t.sizes().vec();
  sizes[sizes.size() - 2] = rows;
  sizes[sizes.size() - 1] = columns;
  const Tensor out = zeros(sizes, t, t.scalar_type());
  narrow(narrow(out, -2, 0, t.size(-2)), -1, 0, t.size(-1)).copy_(t);
  return out;
}

Tensor kron_precondition(const Tensor& grad, const Tensor& left, const Tensor& right) {
  constexpr const char* kOp = "kron_precondition";
  count_call(kOp, "cuda");
  const auto sizes = check_precondition(grad, left, right);
  for (const Tensor& t : {grad, left, right}) check_not_double(t, kOp);
  const DeviceGuard guard(grad.device());
  if (left.numel() == 0 && right.numel() == 0) {
    Tensor finite = unary("aten::isfinite", grad);
    for (const int64_t d : {-1, -2}) finite = called<Tensor>("aten::all", "dim", finite, d, true);
    return where(finite, grad, number_like(grad, std::numeric_limits<double>::quiet_NaN()));
  }
  const Tensor out = empty(sizes, grad);
  if (out.numel() == 0) return out;
  const int64_t m = grad.size(-2), n = grad.size(-1), p = out.size(-2), q = out.size(-1);
  if (p == m && q == n) {
    two_sided({{grad, left, right, out}}, kOp);
    return out;
  }
  // Preconditioners are square; others are served all the same.
  const int64_t rows = std::max(m, p), columns = std::max(n, q);
  const Tensor x = extended(grad, rows, columns), found = zeros(x.sizes(), x, x.scalar_type());
  two_sided({{x, extended(left, rows, rows), extended(right, columns, columns), found}}, kOp);
  return out.copy_(narrow(narrow(found, -2, 0, p), -1, 0, q));
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("kron_factors_update_", &boxed<&kron_factors_update_>);
  m.impl("kron_precondition", &boxed<&kron_precondition>);
}

}  // namespace spectral_kernels::cuda
