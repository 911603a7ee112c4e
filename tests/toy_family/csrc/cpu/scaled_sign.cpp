// scaled_sign: the signs of a matrix, times a number.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../check.h"
#include "../counters.h"
#include "parallel.h"
#include "views.h"

namespace spectral_kernels::cpu {
namespace {

template <typename T>
void scaled_sign_of(const Matrix& x, const Matrix& out, double scale) {
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(out.data);
  const T plus = T(scale), minus = T(-scale);
  for (int64_t i = 0; i < x.rows; i++)
    for (int64_t j = 0; j < x.cols; j++) {
      const T value = from[i * x.row_stride + j * x.col_stride];
      to[i * out.row_stride + j * out.col_stride] = value > T(0)   ? plus
                                                    : value < T(0) ? minus
                                                                   : T(0);
    }
}

at::Tensor scaled_sign(const at::Tensor& x, double scale) {
  count_call("scaled_sign", "cpu");
  check_matrix(x, "x");
  TORCH_CHECK_VALUE(scale >= 0 && std::isfinite(scale), "scale must be at least 0 and finite, not ",
                    scale);
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const double work = double(x.size(-2)) * double(x.size(-1));
  parallel_matrices(std::vector<double>(size_t(xs.count()), work), [&](int64_t i, int threads) {
    if (std::isnan(max_abs(xs[i], threads))) {
      fill(outs[i], std::numeric_limits<double>::quiet_NaN());
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "scaled_sign",
                                    [&] { scaled_sign_of<scalar_t>(xs[i], outs[i], scale); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) { m.impl("scaled_sign", &scaled_sign); }

}  // namespace spectral_kernels::cpu
