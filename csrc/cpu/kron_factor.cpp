// L <- beta L + w G Gᵀ and R <- beta R + w GᵀG from one read of G, and left @ G @ right.
#include "kron_factor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../check_factors.h"
#include "../counters.h"
#include "../registration.h"
#include "list_step.h"
#include "parallel.h"
#include "views.h"

namespace spectral_kernels::cpu {

Kind factor_kind(DType grad, DType factor) {
  if (factor == DType::kF64) return Kind::kF64;
  if (grad == DType::kBF16 && kernels().panel[int(Kind::kBF16)] != 0) return Kind::kBF16;
  return Kind::kF32;
}

bool overflows(const Panels& x, double largest, double beta, double weight, const Matrix& factor) {
  if (std::isnan(largest)) return true;
  const double most = factor.dtype == DType::kF64 ? std::numeric_limits<double>::max()
                                                  : double(std::numeric_limits<float>::max());
  if (std::isnan(max_abs_lower(factor))) return true;
  // The largest element of a positive semidefinite matrix is on its diagonal.
  std::vector<double> diagonal(size_t(factor.rows), 0.0);
  double top = 0;
  if (beta != 0)
    for (int64_t i = 0; i < factor.rows; i++) {
      diagonal[size_t(i)] = std::abs(beta * element(factor, i, i));
      if (!(diagonal[size_t(i)] <= most)) return true;
      top = std::max(top, diagonal[size_t(i)]);
    }
  const double bound = weight * largest * largest * double(x.rows);
  if (top + bound <= most / 2) return false;
  // Rare: the sums themselves, in a range where they cannot overflow.
  const double unit = std::ldexp(1.0, exponent_of(largest));
  for (int64_t j = 0; j < x.cols; j++) {
    double sum = 0;
    for (int64_t i = 0; i < x.rows; i++) sum += std::pow(element(x, i, j) / unit, 2);
    if (!(diagonal[size_t(j)] / unit / unit + weight * sum <= most / unit / unit)) return true;
  }
  return false;
}

void accumulate(const Panels& x, double beta, double weight, const Matrix& factor, int threads) {
  Product p;
  p.a = p.b = x;
  p.symmetric = true;
  p.alpha = weight;
  p.beta = beta;
  p.add = p.store = factor;
  run(p, threads);
}

bool TwoSidedShape::left_first() const {
  if (!has_right) return true;
  if (!has_left) return false;
  return double(p) * double(n) * double(m + q) <= double(m) * double(q) * double(n + p);
}
bool TwoSidedShape::needs_x() const { return has_left && left_first(); }
bool TwoSidedShape::needs_x_t() const { return !needs_x(); }
bool TwoSidedShape::small(Kind kind) const {
  constexpr int64_t kLargest = 192;
  return kind != Kind::kBF16 && std::max({m, n, p, q}) <= kLargest;
}
size_t TwoSidedShape::workspace_bytes(Kind kind) const {
  if (!has_left || !has_right) return 0;
  return left_first() ? panel_bytes(n, p, kind) : panel_bytes(m, q, kind);
}

void precondition(const TwoSidedShape& shape, const TwoSided& o, Product last, Workspace& workspace,
                  int threads) {
  Product first;
  first.whole = last.whole;
  const bool left_first = shape.left_first();
  if (left_first) {
    first.a = o.left_t;
    first.b = o.x;
  } else {
    first.a = o.x_t;
    first.b = o.right;
  }
  if (!shape.has_left || !shape.has_right) {
    last.a = first.a;
    last.b = first.b;
    return run(last, threads);
  }
  if (left_first) {
    const Panels middle_t = take_panels(workspace, shape.n, shape.p, first.b.kind);
    first.out_t = middle_t;
    last.a = middle_t;
    last.b = o.right;
  } else {
    const Panels middle = take_panels(workspace, shape.m, shape.q, first.b.kind);
    first.out = middle;
    last.a = o.left_t;
    last.b = middle;
  }
  run(first, threads);
  run(last, threads);
}

namespace {

Panels pack(const Matrix& m, bool transposed, Kind kind, Workspace& workspace, int threads) {
  Pack p;
  p.x = m;
  Panels& out = transposed ? p.out_t : p.out;
  out = transposed ? take_panels(workspace, m.cols, m.rows, kind)
                   : take_panels(workspace, m.rows, m.cols, kind);
  const Panels packed = out;
  run(p, threads);
  return packed;
}

struct FactorStep {
  double beta, weight;
};

Kind kind_of_update(const Matrix& grad, const Matrix& left, const Matrix& right,
                    const Matrix& left_root, const Matrix& right_root) {
  const DType factor = left ? left.dtype : right.dtype;
  if (left_root || right_root) return factor == DType::kF64 ? Kind::kF64 : Kind::kF32;
  return factor_kind(grad.dtype, factor);
}

size_t update_bytes(int64_t m, int64_t n, Kind kind) {
  return 2 * panel_bytes(m, n, kind) + 2 * panel_bytes(n, m, kind) + panel_bytes(m, m, kind) +
         panel_bytes(n, n, kind);
}

// One matrix. With a root X_R the left increment is (G X_R)(G X_R)ᵀ / n, and likewise on the right.
// Returns false, with nothing written, if an increment is not finite.
bool update_factors(const FactorStep& step, const Matrix& grad, const Matrix& left,
                    const Matrix& right, const Matrix& left_root, const Matrix& right_root,
                    int threads) {
  const int64_t m = grad.rows, n = grad.cols;
  if (!left && !right) return true;
  const Kind kind = kind_of_update(grad, left, right, left_root, right_root);
  Workspace workspace(update_bytes(m, n, kind));
  Pack p;
  p.x = grad;
  p.out = take_panels(workspace, m, n, kind);
  p.out_t = take_panels(workspace, n, m, kind);
  Panels for_left = p.out_t, for_right = p.out;
  if (!left) p.out_t = {};
  if (!right) p.out = {};
  double left_largest = max_abs(grad, threads), right_largest = left_largest;
  if (std::isnan(left_largest)) return false;
  run(p, threads);
  double left_weight = step.weight, right_weight = step.weight;
  if (left && right_root) {
    Product product;
    product.a = p.out_t;
    product.b = pack(right_root, false, kind, workspace, threads);
    product.out_t = for_left = take_panels(workspace, n, m, kind);
    run(product, threads);
    left_largest = max_abs(flat(for_left), threads);
    left_weight /= double(n);
  }
  if (right && left_root) {
    Product product;
    product.a = pack(left_root, false, kind, workspace, threads);
    product.b = p.out;
    product.out = for_right = take_panels(workspace, m, n, kind);
    run(product, threads);
    right_largest = max_abs(flat(for_right), threads);
    right_weight /= double(m);
  }
  if (left && overflows(for_left, left_largest, step.beta, left_weight, left)) return false;
  if (right && overflows(for_right, right_largest, step.beta, right_weight, right)) return false;
  if (left) accumulate(for_left, step.beta, left_weight, left, threads);
  if (right) accumulate(for_right, step.beta, right_weight, right, threads);
  return true;
}

void kron_factors_update_(const Tensor& left, const Tensor& right, const Tensor& grad,
                          const Tensor& skipped, double beta, double weight,
                          const Tensor& left_root, const Tensor& right_root) {
  count_call("kron_factors_update_", "cpu");
  check_factors_update(left, right, grad, skipped, left_root, right_root);
  if (grad.numel() == 0) return;
  const int64_t m = grad.size(-2), n = grad.size(-1);
  const MatrixBatch grads(grad);
  const FactorStep step{beta, weight};
  const double work = 0.5 * double(m) * double(n) * double(m + n);
  const size_t count = size_t(grads.count());
  const Kind kind = kind_of_update(grads[0], optional_matrix(left, 0), optional_matrix(right, 0),
                                   optional_matrix(left_root, 0), optional_matrix(right_root, 0));
  std::atomic<int64_t> skips{0};
  const auto update = [&](int64_t i, int threads) {
    if (!update_factors(step, grads[i], optional_matrix(left, i), optional_matrix(right, i),
                        optional_matrix(left_root, i), optional_matrix(right_root, i), threads))
      skips++;
  };
  parallel_matrices(std::vector<double>(count, work), update,
                    std::vector<size_t>(count, update_bytes(m, n, kind)));
  *skipped.data_ptr<int64_t>() += skips.load();
}

bool rows_lie_together(const Matrix& m) { return m.col_stride == 1; }

// left @ x @ right of small matrices of one dtype, where they lie. Returns whether it was done.
bool precondition_in_place(const TwoSidedShape& shape, Kind kind, const Matrix& x,
                           const Matrix& left, const Matrix& right, const Matrix& out,
                           int threads) {
  const DType type = kind == Kind::kF64 ? DType::kF64 : DType::kF32;
  for (const Matrix* m : {&x, &left, &right, &out})
    if (*m && m->dtype != type) return false;
  if ((right && !rows_lie_together(right)) || !rows_lie_together(out)) return false;
  if (!left) return run(InPlace{x, right, out}, threads), true;
  if (!rows_lie_together(x) && (!right || shape.left_first())) return false;
  if (!right) return run(InPlace{left, x, out}, threads), true;
  const bool left_first = shape.left_first();
  const int64_t rows = left_first ? shape.p : shape.m, cols = left_first ? shape.n : shape.q;
  Workspace workspace(size_t(rows * cols) * element_size(type));
  const Matrix middle{
      workspace.take(size_t(rows * cols) * element_size(type)), rows, cols, cols, 1, type};
  if (left_first) {
    run(InPlace{left, x, middle}, threads);
    run(InPlace{middle, right, out}, threads);
  } else {
    run(InPlace{x, right, middle}, threads);
    run(InPlace{left, middle, out}, threads);
  }
  return true;
}

Tensor kron_precondition(const Tensor& grad, const Tensor& left, const Tensor& right) {
  count_call("kron_precondition", "cpu");
  const auto sizes = check_precondition(grad, left, right);
  const bool has_left = left.numel() > 0, has_right = right.numel() > 0;
  const int64_t m = grad.size(-2), n = grad.size(-1);
  Tensor out = empty(sizes, grad);
  if (out.numel() == 0) return out;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (!has_left && !has_right) {
    out.copy_(grad);
    const MatrixBatch copies(out);
    const std::vector<double> work(size_t(copies.count()), double(m) * double(n));
    parallel_matrices(work, [&](int64_t i, int threads) {
      if (std::isnan(max_abs(copies[i], threads))) fill(copies[i], nan);
    });
    return out;
  }
  const TwoSidedShape shape{
      m, n, has_left ? left.size(-2) : m, has_right ? right.size(-1) : n, has_left, has_right};
  const auto is = [&](ScalarType type) {
    return (!has_left || left.scalar_type() == type) &&
           (!has_right || right.scalar_type() == type) && grad.scalar_type() == type;
  };
  const bool any_double = grad.scalar_type() == kDouble ||
                          (has_left && left.scalar_type() == kDouble) ||
                          (has_right && right.scalar_type() == kDouble);
  const Kind kind = any_double                                                ? Kind::kF64
                    : is(kBFloat16) && kernels().panel[int(Kind::kBF16)] != 0 ? Kind::kBF16
                                                                              : Kind::kF32;
  const MatrixBatch grads(grad), outs(out);
  const double work =
      double(m) * double(n) * (double(has_left ? shape.p : 0) + double(has_right ? shape.q : 0));
  parallel_matrices(std::vector<double>(size_t(grads.count()), work), [&](int64_t i, int threads) {
    const Matrix g = grads[i], l = optional_matrix(left, i), r = optional_matrix(right, i);
    if (!shape.small(kind) || !precondition_in_place(shape, kind, g, l, r, outs[i], threads)) {
      Workspace workspace(panel_bytes(m, n, kind) + panel_bytes(n, m, kind) +
                          panel_bytes(m, shape.p, kind) + panel_bytes(n, shape.q, kind) +
                          shape.workspace_bytes(kind));
      TwoSided operands;
      if (shape.needs_x()) operands.x = pack(g, false, kind, workspace, threads);
      if (shape.needs_x_t()) operands.x_t = pack(g, true, kind, workspace, threads);
      if (l) operands.left_t = pack(l, true, kind, workspace, threads);
      if (r) operands.right = pack(r, false, kind, workspace, threads);
      Product last;
      last.store = outs[i];
      last.whole = shape.small(kind);
      precondition(shape, operands, last, workspace, threads);
    }
    // An overflow stays where it is; a non-finite element of the input makes the whole matrix NaN.
    if (std::isnan(max_abs(outs[i], threads)) &&
        (std::isnan(max_abs(g, threads)) || (l && std::isnan(max_abs(l, threads))) ||
         (r && std::isnan(max_abs(r, threads)))))
      fill(outs[i], nan);
  });
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CPU_OPERATORS(m) {
  m.impl("kron_factors_update_", &boxed<&kron_factors_update_>);
  m.impl("kron_precondition", &boxed<&kron_precondition>);
}

}  // namespace spectral_kernels::cpu
