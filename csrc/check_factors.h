// Input checks of the operators of kron_factor, for every backend.
#pragma once

#include <vector>

#include "check_lists.h"

namespace spectral_kernels {

inline void check_side(const Tensor& factor, const char* name, const Tensor& grad, int64_t n) {
  if (factor.numel() == 0) return;
  check_full_precision(factor, name);
  auto expected = grad.sizes().vec();
  expected[expected.size() - 1] = expected[expected.size() - 2] = n;
  CHECK_VALUE(factor.sizes() == expected, name, " must have shape ", IntArrayRef(expected),
              " for a gradient of shape ", grad.sizes(), ", got ", factor.sizes());
  CHECK_VALUE(factor.device() == grad.device(), name, " is on ", factor.device(), ", grad is on ",
              grad.device());
}

inline void check_factors_update(const Tensor& left, const Tensor& right, const Tensor& grad,
                                 const Tensor& skipped, const Tensor& left_root,
                                 const Tensor& right_root) {
  check_matrix(grad, "grad");
  const int64_t m = grad.size(-2), n = grad.size(-1);
  check_side(left, "left", grad, m);
  check_side(right, "right", grad, n);
  check_side(left_root, "left_root", grad, m);
  check_side(right_root, "right_root", grad, n);
  check_writable(left, "left");
  check_writable(right, "right");
  check_distinct({left, right}, grad);
  CHECK_TYPE(left.numel() == 0 || right.numel() == 0 || left.scalar_type() == right.scalar_type(),
             "left is ", left.scalar_type(), " but right is ", right.scalar_type());
  CHECK_TYPE(skipped.scalar_type() == kLong && skipped.numel() == 1,
             "skipped must be one int64, got ", skipped.scalar_type(), " of shape ",
             skipped.sizes());
  CHECK_VALUE(skipped.device() == grad.device(), "skipped is on ", skipped.device(),
              ", grad is on ", grad.device());
}

// A side of grad whose dimension `dim` has to be `size`.
inline void check_multiplier(const Tensor& t, const char* name, const Tensor& grad, int64_t dim,
                             int64_t size) {
  if (t.numel() == 0) return;
  check_matrix(t, name);
  CHECK_VALUE(t.dim() == grad.dim() &&
                  t.sizes().slice(0, t.dim() - 2) == grad.sizes().slice(0, t.dim() - 2) &&
                  t.size(dim) == size,
              name, " of shape ", t.sizes(), " does not fit a gradient of shape ", grad.sizes());
  CHECK_VALUE(t.device() == grad.device(), name, " is on ", t.device(), ", grad is on ",
              grad.device());
}

// kron_precondition; returns the shape of its result.
inline std::vector<int64_t> check_precondition(const Tensor& grad, const Tensor& left,
                                               const Tensor& right) {
  check_matrix(grad, "grad");
  check_multiplier(left, "left", grad, -1, grad.size(-2));
  check_multiplier(right, "right", grad, -2, grad.size(-1));
  auto sizes = grad.sizes().vec();
  if (left.numel() > 0) sizes[sizes.size() - 2] = left.size(-2);
  if (right.numel() > 0) sizes[sizes.size() - 1] = right.size(-1);
  return sizes;
}

}  // namespace spectral_kernels
