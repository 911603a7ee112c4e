// The operators of the CUDA backend, and those on small symmetric matrices. Like the other files
// here that know torch it keeps to c10/core, so that it also builds, links and loads beside a CPU
// torch.
#include "register.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../counters.h"
#include "eigenbasis.h"
#include "inverse_root.h"
#include "list_step.h"
#include "newton_schulz.h"
#include "tensors.h"

namespace spectral_kernels::cuda {
namespace {

// Eigenvalues, descending, and eigenvectors of (count, n, n) matrices in fp64, NaN where there are
// none.
struct Eigen {
  at::Tensor values, vectors;
};

Eigen eigen_of(const at::Tensor& a, const char* op) {
  const int64_t n = a.size(-1), bytes = jacobi_bytes(int(n)), limit = shared_memory_of(a);
  TORCH_CHECK_NOT_IMPLEMENTED(bytes <= limit, op, ": a side of ", n, " needs ", bytes,
                              " bytes of shared memory, and this device has ", limit);
  const auto options = a.options().dtype(at::kDouble);
  const int64_t count = leading(a);
  const Eigen found{at::empty({count, n}, options), at::empty({count, n, n}, options)};
  const at::Tensor sweeps = at::empty({count}, a.options().dtype(at::kLong));
  const at::Tensor largest = at::zeros({count}, a.options().dtype(at::kInt));
  std::vector<Entry> entries;
  append(entries, a, {}, a, 1);
  number(entries);
  uint32_t* bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  const EigenResults results{found.values.data_ptr<double>(), found.vectors.data_ptr<double>(),
                             sweeps.data_ptr<int64_t>()};
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(a)), op);
  check_launch(launch_eigenbasis(entries, bits, results, stream_of(a)), op);
  return found;
}

void check_square_onchip(const at::Tensor& a, const char* op) {
  check_full_precision(a, "a");
  check_square(a, "a");
  check_not_double(a, op);
  TORCH_CHECK_NOT_IMPLEMENTED(a.size(-1) <= kMostOnChipRows, op,
                              ": the CUDA C++ kernels take matrices with a side of at most ",
                              kMostOnChipRows, ", got shape ", a.sizes());
}

std::tuple<at::Tensor, at::Tensor> eigenbasis(const at::Tensor& a) {
  constexpr const char* kOp = "eigenbasis";
  count_call(kOp, "cuda");
  check_square_onchip(a, kOp);
  const c10::DeviceGuard guard(a.device());
  if (a.numel() == 0)
    return {at::empty(a.sizes().slice(0, size_t(a.dim() - 1)), a.options()), at::empty_like(a)};
  const Eigen found = eigen_of(a, kOp);
  return {found.values.to(at::kFloat).view(a.sizes().slice(0, size_t(a.dim() - 1))),
          found.vectors.to(at::kFloat).view(a.sizes())};
}

// One matrix from its eigenvalues and eigenvectors, where no iteration is safe or none succeeded.
// reference/inverse_root.py specifies the cut, the residual and when it is accepted.
struct EigenRoot {
  at::Tensor root, residual;
  int64_t status;
};

EigenRoot eigen_root(const at::Tensor& a, const at::Tensor& values, const at::Tensor& vectors,
                     const at::Tensor& delta, const at::Tensor& signs, int p, bool after_attempts) {
  constexpr double kUnitRoundoff = 0x1p-24, kUnitRoundoff64 = 0x1p-53;
  const int64_t n = a.size(-1);
  const at::Tensor given = a.to(at::kDouble);
  const at::Tensor symmetric = (given + given.mT()) * 0.5;
  const double cut = std::max(4 * kUnitRoundoff, 4 * double(n) * kUnitRoundoff64);
  const double ridge = delta.item<double>(), least = values[n - 1].item<double>();
  const double largest = std::max(0.0, values[0].item<double>());
  const at::Tensor spectrum = values.clamp_min(0) + ridge;
  const at::Tensor kept = spectrum > (ridge > 0 ? 0 : cut * largest);
  const auto power = [&](double exponent) {
    return at::where(kept, spectrum.pow(exponent / p), at::zeros_like(spectrum));
  };
  const at::Tensor half = vectors * power(-0.5);
  const at::Tensor checked = (spectrum > std::max(cut, 1e-12) * (largest + ridge)).to(at::kDouble);
  const auto apply = [&](double exponent, const at::Tensor& y) {
    return at::matmul(vectors * (power(exponent) * checked), at::matmul(vectors.mT(), y));
  };
  const at::Tensor right = apply(-double(p - p / 2), signs);
  const at::Tensor product = apply(-double(p / 2), at::matmul(symmetric, right) + right * ridge);
  const at::Tensor wanted = at::matmul(vectors * checked, at::matmul(vectors.mT(), signs));
  const double residual = ((product - wanted).norm() / signs.norm()).item<double>();
  EigenRoot result{at::matmul(half, half.mT()), product.new_full({}, residual), 0};
  const bool indefinite = least < -std::sqrt(double(n)) * cut * largest;
  if (indefinite || !(residual <= 0.25))
    result.status = 1;
  else if (!kept.all().item<bool>())
    result.status = kRootRankDeficient;
  else
    result.status = after_attempts ? 2 : 0;
  return result;
}

const RootSchedules& schedules_of(int64_t p) {
  static const std::array<RootSchedules, 8> all = [] {
    std::array<RootSchedules, 8> out;
    for (int i = 0; i < 8; i++) out[size_t(i)] = root_schedules(i + 1);
    return out;
  }();
  return all[size_t(p - 1)];
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> inverse_root(
    const at::Tensor& a, int64_t p, double ridge, double relative_ridge, c10::string_view method) {
  constexpr const char* kOp = "inverse_root";
  count_call(kOp, "cuda");
  check_square_onchip(a, kOp);
  TORCH_CHECK_VALUE(p >= 1 && p <= 8, "p must be in 1..8, got ", p);
  TORCH_CHECK_VALUE(ridge >= 0 && std::isfinite(ridge), "ridge must be at least 0, got ", ridge);
  TORCH_CHECK_VALUE(relative_ridge >= 0 && std::isfinite(relative_ridge),
                    "relative_ridge must be at least 0, got ", relative_ridge);
  const std::string how(method);
  check_one_of(how, "method", {"auto", "iteration", "eigen"});
  const c10::DeviceGuard guard(a.device());
  const auto batch = a.sizes().slice(0, size_t(a.dim() - 2));
  const at::Tensor root =
      at::empty(a.sizes(), a.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor status = at::empty(batch, a.options().dtype(at::kLong));
  const at::Tensor steps = at::empty(batch, a.options().dtype(at::kLong));
  const at::Tensor residual = at::empty(batch, a.options()), delta = at::empty(batch, a.options());
  if (a.numel() == 0) return {root, status, steps, residual, delta};
  const int64_t bytes = root_onchip_bytes(int(a.size(-1))), limit = shared_memory_of(a);
  TORCH_CHECK_NOT_IMPLEMENTED(bytes <= limit, kOp, ": a side of ", a.size(-1), " needs ", bytes,
                              " bytes of shared memory, and this device has ", limit);
  std::vector<Entry> entries;
  append(entries, a, {}, root, 1);
  number(entries);
  const at::Tensor largest = at::zeros({leading(a)}, a.options().dtype(at::kInt));
  uint32_t* bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  RootCall call;
  call.ridge = float(ridge);
  call.relative_ridge = float(relative_ridge);
  call.always = how == "iteration";
  call.never = how == "eigen";
  const RootResults results{status.data_ptr<int64_t>(), steps.data_ptr<int64_t>(),
                            residual.data_ptr<float>(), delta.data_ptr<float>()};
  const RootSchedules& schedules = schedules_of(p);
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(a)), kOp);
  check_launch(launch_inverse_root(entries, schedules, call, bits, results, stream_of(a)), kOp);

  // The one wait for the device, for matrices that the iteration does not serve.
  const int64_t n = a.size(-1), count = leading(a);
  const at::Tensor outcomes = status.reshape({count}).cpu();
  const at::Tensor flat_a = a.reshape({count, n, n}), flat_root = root.view({count, n, n});
  std::vector<int64_t> left;
  std::vector<at::Tensor> stacked;
  for (int64_t i = 0; i < count; i++)
    if (outcomes.const_data_ptr<int64_t>()[i] < 0) {
      left.push_back(i);
      stacked.push_back(flat_a[i]);
    }
  if (left.empty()) return {root, status, steps, residual, delta};
  const Eigen eigen = eigen_of(at::stack(stacked), kOp);
  std::vector<double> values;
  for (int64_t j = 0; j < n * 8; j++)
    values.push_back(schedules.signs[j / 32] >> j % 32 & 1 ? -1.0 : 1.0);
  const at::Tensor signs = at::tensor(values, a.options().dtype(at::kDouble)).view({n, 8});
  for (size_t k = 0; k < left.size(); k++) {
    const int64_t i = left[k];
    const bool failed = outcomes.const_data_ptr<int64_t>()[i] == kRootFailed;
    const EigenRoot found =
        eigen_root(flat_a[i], eigen.values[int64_t(k)], eigen.vectors[int64_t(k)],
                   delta.reshape({count})[i], signs, int(p), failed);
    flat_root[i].copy_(found.root);
    status.view({count})[i].fill_(found.status);
    steps.view({count})[i].zero_();
    residual.view({count})[i].copy_(found.residual);
  }
  return {root, status, steps, residual, delta};
}

}  // namespace

void register_operators(torch::Library& m) {
  register_newton_schulz(m);
  m.impl("eigenbasis", &eigenbasis);
  m.impl("inverse_root", &inverse_root);
}

}  // namespace spectral_kernels::cuda

#ifndef SPECTRAL_KERNELS_EMULATION
TORCH_LIBRARY_IMPL(spectral_kernels, CUDA, m) { spectral_kernels::cuda::register_operators(m); }
#endif
