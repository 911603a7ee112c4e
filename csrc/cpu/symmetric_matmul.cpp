// gram: X Xᵀ, one triangle computed, the other mirrored.

#include <cmath>
#include <limits>
#include <type_traits>

#include "../check.h"
#include "../counters.h"
#include "../registration.h"
#include "parallel.h"
#include "views.h"
#include "with_type.h"

namespace spectral_kernels::cpu {
namespace {

bool diagonal_is_finite(const Matrix& m) {
  return with_type(m.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* data = static_cast<const T*>(m.data);
    bool finite = true;
    for (int64_t i = 0; i < m.rows; i++)
      finite &= std::isfinite(Wide(data[i * (m.row_stride + m.col_stride)]));
    return finite;
  });
}

void gram_of(const Matrix& x, const Matrix& out, int threads) {
  const Kind kind = x.dtype == DType::kF64 ? Kind::kF64
                    : x.dtype == DType::kBF16 && kernels().panel[int(Kind::kBF16)] != 0
                        ? Kind::kBF16
                        : Kind::kF32;
  Product product;
  product.symmetric = true;
  product.store = out;
  product.rows = x;
  product.a = product.b = {nullptr, x.cols, x.rows, kind, 0};
  if (kernels().reads_rows != nullptr && kernels().reads_rows(product)) {
    run(product, threads);
  } else {
    Workspace workspace(panel_bytes(x.cols, x.rows, kind));
    Pack pack;
    pack.x = x;
    product.a = product.b = pack.out_t = take_panels(workspace, x.cols, x.rows, kind);
    product.rows = {};
    run(pack, threads);
    run(product, threads);
  }
  // A row that is not finite shows on the diagonal; so does an overflow, which stays where it is.
  if (!diagonal_is_finite(out) && std::isnan(max_abs(x, threads)))
    fill(out, std::numeric_limits<double>::quiet_NaN());
}

Tensor gram(const Tensor& x) {
  count_call("gram", "cpu");
  check_matrix(x, "x");
  auto sizes = x.sizes().vec();
  sizes.back() = x.size(-2);
  Tensor out = empty(sizes, x);
  if (out.numel() == 0) return out;
  const MatrixBatch xs(x), outs(out);
  const double work = double(x.size(-2)) * double(x.size(-2)) * double(x.size(-1));
  parallel_matrices(std::vector<double>(size_t(xs.count()), work),
                    [&](int64_t i, int threads) { gram_of(xs[i], outs[i], threads); });
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) { m.impl("gram", &boxed<&gram>); }

}  // namespace spectral_kernels::cpu
