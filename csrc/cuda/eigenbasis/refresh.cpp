#include "refresh.h"

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "../base/list_step.h"
#include "../base/tensors.h"
#include "../base/torch_ops.h"
#include "../kron_factor/products.h"
#include "jacobi.h"

namespace spectral_kernels::cuda {
namespace {

constexpr double kUnitRoundoff = 0x1p-24;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Eigen jacobi(const Tensor& a, const char* op) {
  const int64_t n = a.size(-1), count = leading(a);
  const Eigen found{empty({count, n}, a, kDouble), empty({count, n, n}, a, kDouble)};
  const Tensor sweeps = empty({count}, a, kLong);
  const Tensor largest = zeros({count}, a, kInt);
  std::vector<Entry> entries;
  append(entries, a, {}, a, 1);
  number(entries);
  for (Entry& e : entries) e.square = e.first * n * n;
  uint32_t* bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  const EigenResults results{found.values.data_ptr<double>(), found.vectors.data_ptr<double>(),
                             sweeps.data_ptr<int64_t>()};
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(a)), op);
  check_launch(launch_eigenbasis(entries, bits, nullptr, results, stream_of(a)), op);
  return found;
}

Eigen eigh(const Tensor& symmetric) {
  auto [values, vectors] =
      called_for<Tensor, Tensor>("aten::linalg_eigh", "", symmetric, std::string("L"));
  return {values, vectors};
}

// Nothing where the solver does not converge. Torch's stable interface does not tell that from
// other failures, before 2.13 not even in words: but memory that is lacking, a library or a device
// that does not work are lacking to the identity of this size too, of which every solver is sure.
std::optional<Eigen> decomposed(const Tensor& symmetric) {
  try {
    return eigh(symmetric);
  } catch (const TorchError&) {
  }
  eigh(identity(symmetric.size(0), symmetric));
  try {
    return eigh(symmetric);  // memory may have been lacking for a moment
  } catch (const TorchError&) {
    return std::nullopt;
  }
}

Eigen dense(const Tensor& a) {
  const int64_t n = a.size(-1), count = leading(a);
  const Tensor wide = converted(reshaped(a, {count, n, n}), kDouble);
  const Eigen found{filled({count, n}, wide, kNaN), filled({count, n, n}, wide, kNaN)};
  for (int64_t i = 0; i < count; i++) {
    const Tensor one = select(wide, 0, i);
    if (!all_finite(one)) continue;
    const std::optional<Eigen> one_found = decomposed(one * 0.5 + transposed_matrix(one) * 0.5);
    if (!one_found) continue;
    const auto [falling, order] = sorted(one_found->values);
    const Tensor columns = index_select(one_found->vectors, 1, order);
    const Tensor place = called<Tensor>("aten::argmax", "", absolute(columns),
                                        std::optional(int64_t(0)), /*keepdim=*/true);
    const Tensor largest = called<Tensor>("aten::gather", "", columns, int64_t(0), place, false);
    select(found.values, 0, i).copy_(falling);
    select(found.vectors, 0, i).copy_(columns * unary("aten::sign", largest));
  }
  return found;
}

Tensor times(const Tensor& a, const Tensor& b, const char* op) {
  const Tensor out = empty_as(b);
  two_sided({{b, a, {}, out}}, op);
  return out;
}

Tensor gram_of_columns(const Tensor& p, const char* op) {
  const Tensor none = zeros(p.sizes(), p, p.scalar_type()), out = empty_as(p);
  accumulate({{p, false, none, out, 0, 1}}, op);
  return out;
}

Tensor lengths_of(const Tensor& columns) {
  return unary("aten::sqrt", column_totals(unary("aten::square", converted(columns, kDouble))));
}

bool is_orthonormal(const Tensor& p, const char* op) {
  constexpr double kLimit = 5e-6;
  const Tensor off = gram_of_columns(p, op) - identity(p.size(0), p);
  return number_of(maximum_of(absolute(off))) <= kLimit;
}

// The upper factor, and a number that is not 0 where there is none.
std::tuple<Tensor, Tensor> cholesky(const Tensor& a) {
  return called_for<Tensor, Tensor>("aten::linalg_cholesky_ex", "", a, /*upper=*/true,
                                    /*check_errors=*/false);
}

// P's orthonormal factor by adaptive CholeskyQR; q is kept if nothing works.
Tensor orthonormal(const Tensor& start, const Tensor& q, const char* op) {
  constexpr double kFirstOrder = 0.03, kLast = 2e-3;
  constexpr int kPasses = 6;
  const Tensor eye = identity(q.size(0), q);
  const double shift = 8 * kUnitRoundoff * std::sqrt(double(q.size(0)));
  Tensor p = start;
  for (int pass = 0; pass < kPasses; pass++) {
    p = p / converted(lengths_of(p), kFloat);
    const Tensor c = gram_of_columns(p, op);
    const double error =
        std::sqrt(number_of(total(unary("aten::square", converted(c - eye, kDouble)))));
    if (error < kFirstOrder) {
      p = times(p, eye - upper_triangle(c, 1), op);
      if (error < kLast) break;
      continue;
    }
    double s = error < 0.5 ? 0 : shift;
    auto [r, info] = cholesky(c + eye * s);
    bool failed = number_of(info) != 0;
    while (failed && s < 1) {
      s = std::max(8 * s, shift);
      std::tie(r, info) = cholesky(c + eye * s);
      failed = number_of(info) != 0;
    }
    if (failed) break;
    const Tensor inverse = called<Tensor>("aten::linalg_solve_triangular", "", r, eye,
                                          /*upper=*/true, /*left=*/true, /*unitriangular=*/false);
    p = times(p, inverse, op);
  }
  if (is_orthonormal(p, op)) return p;
  const auto [basis, r] =
      called_for<Tensor, Tensor>("aten::linalg_qr", "", start, std::string("reduced"));
  const Tensor signs = where(is_negative(diagonal(r)), number_like(r, -1), number_like(r, 1));
  p = basis * signs;
  return is_orthonormal(p, op) ? p : cloned(q);
}

}  // namespace

Eigen eigen_of(const Tensor& a, const char* op) {
  const int64_t n = a.size(-1);
  const bool fits = n <= kMostJacobiRows && jacobi_bytes(int(n)) <= shared_memory_of(a);
  return fits ? jacobi(a, op) : dense(a);
}

Refreshed refreshed_basis(const Tensor& q, const Tensor& a, bool sort, const char* op) {
  const int64_t n = a.size(0);
  const Tensor none = zeros({n}, a, a.scalar_type());
  const Tensor unchanged = std::get<1>(sorted(none));
  const double largest = number_of(maximum_of(absolute(a)));
  if (!(std::isfinite(largest) && all_finite(q)))
    return {filled({n}, a, kNaN), filled(q.sizes(), q, kNaN), unchanged};
  if (largest == 0) return {none, cloned(q), unchanged};
  const int exponent = std::ilogb(largest);
  const auto scaled = [](const Tensor& x, int power) {
    return x * std::ldexp(1.0, power / 2) * std::ldexp(1.0, power - power / 2);
  };
  const Tensor unit = scaled(a, -exponent);
  Tensor p = times((unit + transposed_matrix(unit)) * 0.5, q, op);
  const Tensor lengths = lengths_of(p);
  const Tensor null = lengths <= maximum_of(lengths) * (kUnitRoundoff * std::sqrt(double(n)));
  const Tensor quotients = column_totals(converted(q, kDouble) * p);
  const Tensor values = converted(where(null, number_like(quotients, 0), quotients), kFloat);
  p = where(null, q, p);
  const Tensor order = std::get<1>(sorted(values));
  const Tensor basis = orthonormal(index_select(p, 1, order), index_select(q, 1, order), op);
  const Tensor restored = scaled(values, exponent);
  if (sort) return {index_select(restored, 0, order), basis, order};
  const Tensor unsorted = empty_as(basis);
  called<Tensor>("aten::index_copy_", "", unsorted, int64_t(1), order, basis);
  return {restored, unsorted, order};
}

}  // namespace spectral_kernels::cuda
