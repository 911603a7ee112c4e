#include "eigenbasis_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "basis.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

bool is_zero(const Matrix& basis, int threads) {
  // A row of an orthonormal basis has length 1, so the first one tells unless all are zero.
  Matrix row = basis;
  row.rows = 1;
  return max_abs(row, 1) == 0 && max_abs(basis, threads) == 0;
}

std::vector<double> saved(const Matrix& m) {
  std::vector<double> copy(size_t(m.rows * m.cols));
  if (m) copy_scaled(m, 0, Matrix{copy.data(), m.rows, m.cols, m.cols, 1, DType::kF64});
  return copy;
}

Kind kind_of_state(const Matrix& moment) {
  return moment.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32;
}

Kind kind_of_factors(const Matrix& grad, const Sides& sides) {
  return factor_kind(grad.dtype, (sides.left ? sides.left : sides.right).dtype);
}

size_t own_bytes(int64_t m, int64_t n, Kind kind, Kind factors) {
  return 3 * panel_bytes(m, n, kind) + 2 * panel_bytes(n, m, kind) + panel_bytes(m, n, factors) +
         panel_bytes(n, m, factors);
}

}  // namespace

EigenbasisStep::EigenbasisStep(const Matrix& grad, bool negate, const Matrix& moment,
                               const Sides& sides, double beta, size_t extra, int threads)
    : grad_(grad),
      moment_(moment),
      sides_(sides),
      negate_(negate),
      beta_(beta),
      m_(grad.rows),
      n_(grad.cols),
      kind_(kind_of_state(moment)),
      factor_kind_(kind_of_factors(grad, sides)),
      threads_(threads) {
  largest_ = max_abs(grad, threads);
  finite_ = !std::isnan(largest_) && !std::isnan(max_abs(moment, threads));
  workspace_ = std::make_unique<Workspace>(own_bytes(m_, n_, kind_, factor_kind_) + extra);
}

size_t EigenbasisStep::bytes(const Matrix& grad, const Matrix& moment, const Sides& sides,
                             size_t extra, size_t other, bool refresh) {
  const int64_t m = grad.rows, n = grad.cols;
  const Kind kind = kind_of_state(moment);
  const size_t own = own_bytes(m, n, kind, kind_of_factors(grad, sides)) + extra;
  const size_t x = panel_bytes(m, n, kind) + panel_bytes(n, m, kind);
  const TwoSidedShape shape{m, n, m, n, bool(sides.left_basis), bool(sides.right_basis)};
  const size_t turn = panel_bytes(m, m, kind) + panel_bytes(n, n, kind) +
                      Workspace::rounded(shape.workspace_bytes(kind));
  const size_t bases = std::max(sides.left_basis ? refresh_bytes(m, moment.dtype) : 0,
                                sides.right_basis ? refresh_bytes(n, moment.dtype) : 0);
  // A turn beside a rounded operand; a refresh, with its panels, turns or the bases.
  const size_t refreshing = refresh ? 2 * x + std::max(turn, bases) : 0;
  size_t first = 0;
  for (const Matrix& basis : {sides.left_basis, sides.right_basis})
    if (basis && is_zero(basis, 1)) first = std::max(first, eigenbasis_bytes(basis.rows));
  return own + std::max({turn + x, refreshing, other, first});
}

bool EigenbasisStep::uninitialised() const {
  const Matrix &l = sides_.left_basis, &r = sides_.right_basis;
  return (l || r) && (!l || is_zero(l, threads_)) && (!r || is_zero(r, threads_));
}

Panels EigenbasisStep::packed(bool transposed, Kind kind) {
  Pack pack;
  pack.x = grad_;
  pack.negate = negate_;
  Panels& out = transposed ? pack.out_t : pack.out;
  out =
      transposed ? take_panels(*workspace_, n_, m_, kind) : take_panels(*workspace_, m_, n_, kind);
  const Panels result = out;
  run(pack, threads_);
  return result;
}

void EigenbasisStep::pack_gradient() {
  const TwoSidedShape shape = this->shape();
  const bool sides = shape.has_left || shape.has_right, native = factor_kind_ == kind_;
  const bool needs_x = !sides || shape.needs_x(), needs_x_t = sides && shape.needs_x_t();
  Pack pack;
  pack.x = grad_;
  pack.negate = negate_;
  if (sides_.right || (native && needs_x))
    pack.out = g_ = take_panels(*workspace_, m_, n_, factor_kind_);
  if (sides_.left || (native && needs_x_t))
    pack.out_t = g_t_ = take_panels(*workspace_, n_, m_, factor_kind_);
  if (pack.out || pack.out_t) run(pack, threads_);
  if (needs_x) x_ = native ? g_ : packed(false, kind_);
  if (needs_x_t) x_t_ = native ? g_t_ : packed(true, kind_);
}

bool EigenbasisStep::factors_fit() const {
  const double weight = 1 - beta_;
  const auto fits = [&](const Matrix& factor, const Panels& x) {
    return !factor || !overflows(x, largest_, beta_, weight, factor);
  };
  return fits(sides_.left, g_t_) && fits(sides_.right, g_);
}

bool EigenbasisStep::initialise(bool check) {
  if (check && !factors_fit()) return false;
  if (largest_ == 0) return true;
  accumulate();
  const auto basis_of = [&](const Matrix& factor, const Matrix& basis) {
    std::vector<double> values;
    return !factor || eigenbasis(factor, values, basis, threads_);
  };
  if (basis_of(sides_.left, sides_.left_basis) && basis_of(sides_.right, sides_.right_basis))
    return true;
  if (check) return false;
  for (const Matrix& basis : {sides_.left_basis, sides_.right_basis})
    if (basis) fill(basis, kNaN);
  return true;
}

TwoSidedShape EigenbasisStep::shape() const {
  return {m_, n_, m_, n_, bool(sides_.left_basis), bool(sides_.right_basis)};
}

bool EigenbasisStep::wants_transposed() const { return sides_.right_basis && shape().needs_x_t(); }

void EigenbasisStep::two_sided(const Panels& x, const Panels& x_t, bool back, Product last) {
  const TwoSidedShape shape = this->shape();
  const Kind kind = (x ? x : x_t).kind;
  Workspace workspace(panel_bytes(m_, m_, kind) + panel_bytes(n_, n_, kind) +
                      shape.workspace_bytes(kind));
  TwoSided operands;
  operands.x = x;
  operands.x_t = x_t;
  // Q_Lᵀ X Q_R takes the left operand transposed, which is Q_L; the way back Q_Lᵀ, and Q_Rᵀ on the
  // right.
  const auto pack_basis = [&](const Matrix& basis, int64_t size) {
    const Panels out = take_panels(workspace, size, size, kind);
    Pack pack;
    pack.x = back ? basis.transposed() : basis;
    pack.out = out;
    run(pack, threads_);
    return out;
  };
  if (shape.has_left) operands.left_t = pack_basis(sides_.left_basis, m_);
  if (shape.has_right) operands.right = pack_basis(sides_.right_basis, n_);
  precondition(shape, operands, last, workspace, threads_);
}

Panels EigenbasisStep::rotated() {
  if (!sides_.left_basis && !sides_.right_basis) return x_;
  Product last;
  last.out = take();
  two_sided(x_, x_t_, false, last);
  return last.out;
}

bool EigenbasisStep::squares_fit(const Panels& g) const {
  const double largest = max_abs(flat(g), threads_);
  const double most = kind_ == Kind::kF64 ? std::numeric_limits<double>::max()
                                          : double(std::numeric_limits<float>::max());
  return largest <= std::sqrt(most);  // false for NaN
}

void EigenbasisStep::move(const Panels& u, const Matrix& param, double rate, double decay,
                          bool normalize, Kind precision) {
  Combine direct;
  direct.alpha = -rate;
  direct.delta = decay;
  direct.add = direct.store = param;
  if (sides_.left_basis || sides_.right_basis) {
    Product last;
    if (!normalize) {
      last.alpha = -rate;
      last.beta = decay;
      last.add = last.store = param;
      return rotate_back(u, last, precision);
    }
    direct.a = last.out = take();
    rotate_back(u, last, precision);
  } else {
    direct.a = u;
  }
  if (normalize)
    direct.alpha /= std::sqrt(sum_of_squares(direct.a, threads_) / double(m_ * n_)) + 1e-30;
  run(direct, threads_);
}

void EigenbasisStep::rotate_back(const Panels& u, Product last, Kind precision) {
  const bool round = precision != u.kind;
  Workspace workspace(round ? panel_bytes(u.rows, u.cols, precision) : 0);
  Panels x = u;
  if (round) {
    Combine rounded;
    rounded.a = u;
    x = rounded.out = take_panels(workspace, u.rows, u.cols, precision);
    run(rounded, threads_);
  }
  two_sided(wants_transposed() ? Panels{} : x, wants_transposed() ? x : Panels{}, true, last);
}

void EigenbasisStep::accumulate() {
  if (sides_.left) cpu::accumulate(g_t_, beta_, 1 - beta_, sides_.left, threads_);
  if (sides_.right) cpu::accumulate(g_, beta_, 1 - beta_, sides_.right, threads_);
}

void EigenbasisStep::refresh(const Matrix& v, bool permute) {
  const TwoSidedShape shape = this->shape();
  if (!shape.has_left && !shape.has_right) return;
  Workspace workspace(2 * (panel_bytes(m_, n_, kind_) + panel_bytes(n_, m_, kind_)));
  Pack pack;
  pack.x = moment_;
  const bool transposed = wants_transposed();
  Panels& x = transposed ? pack.out_t : pack.out;
  x = transposed ? take_panels(workspace, n_, m_, kind_) : take_panels(workspace, m_, n_, kind_);
  run(pack, threads_);
  Product back;
  Panels& plain = transposed ? back.out_t : back.out;
  plain =
      transposed ? take_panels(workspace, n_, m_, kind_) : take_panels(workspace, m_, n_, kind_);
  two_sided(pack.out, pack.out_t, true, back);
  const auto renew = [&](const Matrix& basis, const Matrix& factor, bool rows) {
    if (!basis) return;
    if (std::isnan(max_abs(basis, threads_)) || std::isnan(max_abs(factor, threads_)))
      return fill(basis, kNaN);
    const Refresh result = refresh_eigenbasis(basis, factor, permute, basis, threads_);
    if (!permute || !v || std::is_sorted(result.order.begin(), result.order.end())) return;
    std::vector<double> old = saved(v);
    const Matrix from{old.data(), m_, n_, n_, 1, DType::kF64};
    const auto line = [rows](Matrix matrix, int64_t k) {
      const int64_t stride = rows ? matrix.row_stride : matrix.col_stride;
      matrix.data =
          static_cast<char*>(matrix.data) + k * stride * int64_t(element_size(matrix.dtype));
      (rows ? matrix.rows : matrix.cols) = 1;
      return matrix;
    };
    for (size_t k = 0; k < result.order.size(); k++)
      copy_scaled(line(from, result.order[k]), 0, line(v, int64_t(k)));
  };
  renew(sides_.left_basis, sides_.left, true);
  renew(sides_.right_basis, sides_.right, false);
  Product forth;
  forth.store = moment_;
  two_sided(back.out, back.out_t, false, forth);
}

Sides sides_of(const Item& item, const BasisLists& lists) {
  const size_t e = size_t(item.entry);
  return {optional_matrix(lists.lefts[e], item.index), optional_matrix(lists.rights[e], item.index),
          optional_matrix(lists.left_bases[e], item.index),
          optional_matrix(lists.right_bases[e], item.index)};
}

void raise_nonfinite(const std::vector<Item>& items, const BasisLists& lists, TensorList squares) {
  raise_nonfinite(items, {{"grads", lists.grads},
                          {"exp_avgs", lists.exp_avgs},
                          {"exp_avg_sqs", squares},
                          {"lefts", lists.lefts},
                          {"rights", lists.rights},
                          {"left_bases", lists.left_bases},
                          {"right_bases", lists.right_bases},
                          {"params", lists.params}});
}

std::vector<double> eigenbasis_work(const std::vector<Item>& items, const BasisLists& lists) {
  std::vector<double> work;
  for (const Item& item : items) {
    const size_t e = size_t(item.entry);
    const int64_t m = lists.params[e].size(-2), n = lists.params[e].size(-1);
    const double area = double(m) * double(n);
    const auto of_side = [&](const Tensor& factor, int64_t size) {
      if (factor.numel() == 0) return 0.0;
      const double product = area * double(size);
      return 2.5 * product + (lists.refresh[e] != 0 ? refresh_work(size) + 2 * product : 0);
    };
    work.push_back(area + of_side(lists.lefts[e], m) + of_side(lists.rights[e], n));
  }
  return work;
}

}  // namespace spectral_kernels::cpu
