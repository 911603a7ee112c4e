// What inverse_root returns, on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

namespace spectral_kernels {

using RootTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The root, and one number a matrix of everything else; nothing is written yet.
struct RootTensors {
  at::Tensor root, status, steps, residual, delta;

  explicit RootTensors(const at::Tensor& a)
      : root(at::empty(a.sizes(), a.options().memory_format(at::MemoryFormat::Contiguous))) {
    const auto batch = a.sizes().slice(0, size_t(a.dim() - 2));
    for (at::Tensor* t : {&status, &steps}) *t = at::empty(batch, a.options().dtype(at::kLong));
    for (at::Tensor* t : {&residual, &delta}) *t = at::empty(batch, a.options());
  }
  operator RootTuple() const { return {root, status, steps, residual, delta}; }
};

}  // namespace spectral_kernels
