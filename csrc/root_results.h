// What inverse_root returns, on every device.
#pragma once

#include <tuple>

#include "tensor.h"

namespace spectral_kernels {

using RootTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The root, and one number a matrix of everything else; nothing is written yet.
struct RootTensors {
  Tensor root, status, steps, residual, delta;

  explicit RootTensors(const Tensor& a) : root(empty(a.sizes(), a)) {
    const auto batch = a.sizes().slice(0, size_t(a.dim() - 2));
    for (Tensor* t : {&status, &steps}) *t = empty(batch, a, kLong);
    for (Tensor* t : {&residual, &delta}) *t = empty(batch, a);
  }
  operator RootTuple() const { return {root, status, steps, residual, delta}; }
};

}  // namespace spectral_kernels
