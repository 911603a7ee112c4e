// scaled_sign: the signs of a matrix, times a number.
#include <cmath>
#include <limits>

#include "../check.h"
#include "../counters.h"
#include "../registration.h"
#include "parallel.h"
#include "views.h"
#include "with_type.h"

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

Tensor scaled_sign(const Tensor& x, double scale) {
  count_call("scaled_sign", "cpu");
  check_matrix(x, "x");
  CHECK_VALUE(scale >= 0 && std::isfinite(scale), "scale must be at least 0 and finite, not ",
              scale);
  Tensor out = empty(x.sizes(), x);
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const double work = double(x.size(-2)) * double(x.size(-1));
  parallel_matrices(std::vector<double>(size_t(xs.count()), work), [&](int64_t i, int threads) {
    if (std::isnan(max_abs(xs[i], threads))) {
      fill(outs[i], std::numeric_limits<double>::quiet_NaN());
      return;
    }
    with_type(xs[i].dtype,
              [&](auto zero) { scaled_sign_of<decltype(zero)>(xs[i], outs[i], scale); });
  });
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) { m.impl("scaled_sign", &boxed<&scaled_sign>); }

}  // namespace spectral_kernels::cpu
