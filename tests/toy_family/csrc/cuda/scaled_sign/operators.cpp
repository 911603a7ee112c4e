// scaled_sign on CUDA tensors.
#include <cmath>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/tensors.h"

namespace spectral_kernels::cuda {

// target <- scale sign(source), NaN where largest[i] of matrix i is not finite; in scaled_sign.cu.
int launch_scaled_sign(const std::vector<Entry>& entries, const uint32_t* largest, void* stream);

namespace {

Tensor scaled_sign(const Tensor& x, double scale) {
  constexpr const char* kOp = "scaled_sign";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  check_not_double(x, kOp);
  CHECK_VALUE(scale >= 0 && std::isfinite(scale), "scale must be at least 0 and finite, not ",
              scale);
  const DeviceGuard guard(x.device());
  const Tensor out = empty(x.sizes(), x);
  if (x.numel() == 0) return out;
  std::vector<Entry> entries;
  append(entries, x, {}, out, float(scale), false);
  number(entries);
  const Tensor largest = zeros({leading(x)}, x, kInt);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(x)), kOp);
  check_launch(launch_scaled_sign(entries, bits, stream_of(x)), kOp);
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) { m.impl("scaled_sign", &boxed<&scaled_sign>); }

}  // namespace spectral_kernels::cuda
