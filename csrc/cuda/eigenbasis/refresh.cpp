#include "refresh.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/intrusive_ptr.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <unordered_map>

#include "../base/list_step.h"
#include "../base/tensors.h"
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

Eigen dense(const Tensor& a) {
  const int64_t n = a.size(-1), count = leading(a);
  const Tensor wide = a.reshape({count, n, n}).to(kDouble);
  const Eigen found{at::full_like(wide.select(-1, 0), kNaN), at::full_like(wide, kNaN)};
  for (int64_t i = 0; i < count; i++) {
    const Tensor one = wide[i];
    if (!one.isfinite().all().item<bool>()) continue;
    try {
      const auto [values, vectors] = at::linalg_eigh(one * 0.5 + one.mT() * 0.5);
      const auto [sorted, order] = values.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
      const Tensor columns = vectors.index_select(1, order);
      const Tensor largest = columns.gather(0, columns.abs().argmax(0, /*keepdim=*/true));
      found.values[i].copy_(sorted);
      found.vectors[i].copy_(columns * largest.sign());
    } catch (const c10::LinAlgError&) {  // has not converged
    }
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
  return columns.to(kDouble).square().sum(IntArrayRef{0}).sqrt();
}

bool is_orthonormal(const Tensor& p, const char* op) {
  constexpr double kLimit = 5e-6;
  const Tensor off = gram_of_columns(p, op) - at::eye(p.size(0), p.options());
  return (off.abs().max() <= kLimit).item<bool>();
}

// P's orthonormal factor by adaptive CholeskyQR; q is kept if nothing works.
Tensor orthonormal(const Tensor& start, const Tensor& q, const char* op) {
  constexpr double kFirstOrder = 0.03, kLast = 2e-3;
  constexpr int kPasses = 6;
  const Tensor eye = at::eye(q.size(0), q.options());
  const double shift = 8 * kUnitRoundoff * std::sqrt(double(q.size(0)));
  Tensor p = start;
  for (int pass = 0; pass < kPasses; pass++) {
    p = p / lengths_of(p).to(kFloat);
    const Tensor c = gram_of_columns(p, op);
    const double error = std::sqrt((c - eye).to(kDouble).square().sum().item<double>());
    if (error < kFirstOrder) {
      p = times(p, eye - c.triu(1), op);
      if (error < kLast) break;
      continue;
    }
    double s = error < 0.5 ? 0 : shift;
    auto [r, info] = at::linalg_cholesky_ex(c + eye * s, /*upper=*/true);
    bool failed = info.item<int>() != 0;
    while (failed && s < 1) {
      s = std::max(8 * s, shift);
      std::tie(r, info) = at::linalg_cholesky_ex(c + eye * s, /*upper=*/true);
      failed = info.item<int>() != 0;
    }
    if (failed) break;
    p = times(p, at::linalg_solve_triangular(r, eye, /*upper=*/true), op);
  }
  if (is_orthonormal(p, op)) return p;
  const auto [basis, r] = at::linalg_qr(start);
  const Tensor signs = at::where(r.diagonal() < 0, -1.0, 1.0).to(kFloat);
  p = basis * signs;
  return is_orthonormal(p, op) ? p : q.clone();
}

// Weak references keep a TensorImpl's address from being used again.
using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

// The tensors of this process that were seen not to be zero: as many as live, and up to as many
// again that do not, of which only the shell is kept, without memory on a device.
struct Seen {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Weak> tensors;
  size_t swept = 64;  // expired references are dropped when there are so many
};

Seen& seen() {
  static Seen* const all = new Seen;  // outlives every tensor
  return *all;
}

}  // namespace

Eigen eigen_of(const Tensor& a, const char* op) {
  const int64_t n = a.size(-1);
  const bool fits = n <= kMostJacobiRows && jacobi_bytes(int(n)) <= shared_memory_of(a);
  return fits ? jacobi(a, op) : dense(a);
}

Refreshed refreshed_basis(const Tensor& q, const Tensor& a, bool sort, const char* op) {
  const int64_t n = a.size(0);
  const Tensor zeros = at::zeros({n}, a.options());
  const Tensor unchanged = at::arange(n, a.options().dtype(kLong));
  const double largest = a.abs().max().item<double>();
  if (!(std::isfinite(largest) && q.isfinite().all().item<bool>()))
    return {zeros + kNaN, at::full_like(q, kNaN), unchanged};
  if (largest == 0) return {zeros, q.clone(), unchanged};
  const int exponent = std::ilogb(largest);
  const auto scaled = [](const Tensor& x, int power) {
    return x * std::ldexp(1.0, power / 2) * std::ldexp(1.0, power - power / 2);
  };
  const Tensor unit = scaled(a, -exponent);
  Tensor p = times((unit + unit.mT()) * 0.5, q, op);
  const Tensor lengths = lengths_of(p);
  const Tensor null = lengths <= lengths.max() * (kUnitRoundoff * std::sqrt(double(n)));
  const Tensor quotients = (q.to(kDouble) * p).sum(IntArrayRef{0});
  const Tensor values = at::where(null, 0.0, quotients).to(kFloat);
  p = at::where(null, q, p);
  const Tensor order = values.argsort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  const Tensor basis = orthonormal(p.index_select(1, order), q.index_select(1, order), op);
  const Tensor restored = scaled(values, exponent);
  if (sort) return {restored.index_select(0, order), basis, order};
  const Tensor unsorted = empty_as(basis);
  unsorted.index_copy_(1, order, basis);
  return {restored, unsorted, order};
}

bool seen_nonzero(const Tensor& t) {
  Seen& all = seen();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.tensors.find(t.unsafeGetTensorImpl());
  return found != all.tensors.end() && !found->second.expired();
}

void remember_nonzero(const Tensor& t) {
  Seen& all = seen();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.tensors.insert_or_assign(t.unsafeGetTensorImpl(), Weak(t.getIntrusivePtr()));
  if (all.tensors.size() < all.swept) return;
  for (auto it = all.tensors.begin(); it != all.tensors.end();)
    it = it->second.expired() ? all.tensors.erase(it) : std::next(it);
  all.swept = 2 * all.tensors.size() + 64;
}

}  // namespace spectral_kernels::cuda
