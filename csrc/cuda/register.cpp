// The one file of the CUDA backend that knows torch: tensors to tables, workspaces, device and
// stream. c10/core only, so that it also builds, links and loads beside a CPU torch.
#include "register.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../check_lists.h"
#include "../counters.h"
#include "device.h"
#include "inverse_root.h"
#include "list_step.h"
#include "newton_schulz.h"

namespace spectral_kernels::cuda {
namespace {

void* stream_of(const at::Tensor& t) {
  const c10::Device device = t.device();
  if (device.is_cpu()) return nullptr;  // the emulation
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void check_launch(int error, const char* op) {
  TORCH_CHECK(error == 0, op, ": a CUDA kernel could not be launched: ", error_text(error));
}

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return Type::kBF16;
    case at::kHalf:
      return Type::kF16;
    case at::kDouble:
      return Type::kF64;
    default:
      return Type::kF32;
  }
}

// Tensors as entries of a table

int64_t leading(const at::Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 0; d + 2 < t.dim(); d++) count *= t.size(d);
  return count;
}

// The one stride of all leading dimensions together; false if there is none.
bool batch_stride(const at::Tensor& t, int64_t& stride) {
  stride = 0;
  int64_t expected = -1;
  for (int64_t d = t.dim() - 3; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (expected < 0)
      stride = t.stride(d);
    else if (t.stride(d) != expected)
      return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

// Matrices from number `index` on, with the shorter side as rows.
Matrices matrices(const at::Tensor& t, int64_t index, int64_t batch) {
  if (!t.defined()) return {};
  int64_t offset = 0;
  for (int64_t d = t.dim() - 3; d >= 0; d--) {
    offset += index % t.size(d) * t.stride(d);
    index /= t.size(d);
  }
  const bool wide = t.size(-2) <= t.size(-1);
  Matrices m;
  m.data = static_cast<char*>(t.data_ptr()) + offset * int64_t(t.element_size());
  m.type = type_of(t.scalar_type());
  m.row = t.stride(wide ? -2 : -1);
  m.column = t.stride(wide ? -1 : -2);
  m.batch = batch;
  return m;
}

// One entry for the batch, or one a matrix where the leading dimensions have no common stride.
void append(std::vector<Entry>& entries, const at::Tensor& source, const at::Tensor& momentum,
            const at::Tensor& target, float scale) {
  if (source.numel() == 0) return;
  int64_t of_source, of_momentum = 0, of_target;
  bool common = batch_stride(source, of_source) && batch_stride(target, of_target);
  if (momentum.defined()) common = common && batch_stride(momentum, of_momentum);
  const int64_t count = leading(source);
  for (int64_t i = 0; i < count; i += common ? count : 1) {
    Entry e;
    e.source = matrices(source, i, of_source);
    e.momentum = matrices(momentum, i, of_momentum);
    e.target = matrices(target, i, of_target);
    e.rows = int(std::min(source.size(-2), source.size(-1)));
    e.columns = std::max(source.size(-2), source.size(-1));
    e.count = common ? count : 1;
    e.scale = scale;
    entries.push_back(e);
  }
}

// Whether all of it fits on chip, or the reason why not.
void check_onchip(const at::Tensor& t, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(t.scalar_type() != at::kDouble, op,
                              ": the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64");
  const int64_t side = std::min(t.size(-2), t.size(-1));
  TORCH_CHECK_NOT_IMPLEMENTED(side <= kMostOnChipRows, op,
                              ": the CUDA C++ kernels take matrices with a side of at most ",
                              kMostOnChipRows, ", got shape ", t.sizes());
  const int64_t limit = shared_memory_limit(std::max(0, int(t.device().index())));
  TORCH_CHECK_NOT_IMPLEMENTED(onchip_bytes(int(side)) <= limit, op, ": a side of ", side, " needs ",
                              onchip_bytes(int(side)),
                              " bytes of shared memory, and this device has ", limit);
}

// Newton–Schulz

// How a list is iterated on, but for the restarts of its entries.
struct Plan {
  std::vector<Rows> rows;
  std::string method;
  bool full = false, f16 = false, schatten8 = false;
  int planes = 1;
  double norm_factor = 1, eps = 0;
  const char* op;

  Plan(at::ArrayRef<double> flat_rows, c10::string_view method_, at::ScalarType compute_dtype,
       double eps_, c10::string_view norm, double norm_factor_, const char* op_)
      : method(method_), norm_factor(norm_factor_), eps(eps_), op(op_) {
    TORCH_CHECK_VALUE(!flat_rows.empty() && flat_rows.size() % 3 == 0,
                      "rows must hold a, b, c for every step, got ", flat_rows.size(), " numbers");
    check_one_of(method, "method", {"auto", "standard", "gram"});
    check_one_of(std::string(norm), "norm", {"frobenius", "schatten8"});
    TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and at least 0, got ",
                      eps);
    TORCH_CHECK_VALUE(norm_factor > 0 && std::isfinite(norm_factor),
                      "norm_factor must be positive and finite, got ", norm_factor);
    TORCH_CHECK_NOT_IMPLEMENTED(
        compute_dtype == at::kFloat || compute_dtype == at::kHalf || compute_dtype == at::kBFloat16,
        op, ": the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64");
    for (size_t i = 0; i < flat_rows.size(); i += 3)
      rows.push_back({flat_rows[i], flat_rows[i + 1], flat_rows[i + 2]});
    full = compute_dtype == at::kFloat;
    f16 = compute_dtype != at::kBFloat16;
    planes = full ? 2 : 1;
    schatten8 = norm == "schatten8";
  }

  // Steps before which X is formed anew. In full precision the Gram form keeps the accuracy of the
  // standard one only with restarts that were measured for the rows; with a 16-bit X the 22 bits
  // of its Gram matrix are enough without.
  std::vector<int64_t> cuts(at::IntArrayRef restarts) const {
    std::vector<int64_t> steps;
    if (method == "standard" || (method == "auto" && full && restarts.empty()))
      for (size_t t = 1; t < rows.size(); t++) steps.push_back(int64_t(t));
    else if (method == "gram" || full)
      steps.assign(restarts.begin(), restarts.end());
    return steps;
  }

  std::vector<Segment> segments(const std::vector<int64_t>& steps) const {
    std::vector<Segment> out;
    TORCH_CHECK_NOT_IMPLEMENTED(
        plan_segments(rows, steps, f16, schatten8, norm_factor, eps, out), op,
        ": these coefficients grow beyond what the CUDA C++ kernels can hold");
    return out;
  }
};

// Scratch of one call, in one allocation.
class Scratch {
 public:
  Scratch(const OnChipSizes& sizes, const at::Tensor& like) {
    const int64_t packed = aligned(sizes.packed * 2), parts = aligned(sizes.parts * 4),
                  q = aligned(sizes.q * 2), alpha = aligned(sizes.matrices * 4);
    bytes_ = at::empty({packed + parts + q + alpha}, like.options().dtype(at::kByte));
    largest_ = at::zeros({sizes.matrices}, like.options().dtype(at::kInt));
    char* at = static_cast<char*>(bytes_.data_ptr());
    buffers.packed = reinterpret_cast<uint16_t*>(at);
    buffers.parts = reinterpret_cast<float*>(at += packed);
    buffers.q = reinterpret_cast<uint16_t*>(at += parts);
    buffers.alpha = reinterpret_cast<float*>(at += q);
  }
  uint32_t* largest() const { return reinterpret_cast<uint32_t*>(largest_.data_ptr()); }
  at::Tensor largest_on_host() const { return largest_.cpu(); }

  OnChipBuffers buffers;

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  at::Tensor bytes_, largest_;
};

at::Tensor newton_schulz(const at::Tensor& x, at::ArrayRef<double> rows, c10::string_view method,
                         at::IntArrayRef restarts, at::ScalarType compute_dtype, double eps,
                         c10::string_view norm, double norm_factor) {
  constexpr const char* kOp = "newton_schulz";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  const std::vector<Segment> segments = plan.segments(plan.cuts(restarts));
  const c10::DeviceGuard guard(x.device());
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  check_onchip(x, kOp);
  std::vector<Entry> entries;
  append(entries, x, {}, out, 1);
  Scratch scratch(place_onchip(entries, plan.planes), x);
  void* stream = stream_of(x);
  Prologue prologue;
  prologue.f16 = plan.f16;
  prologue.planes = plan.planes;
  check_launch(launch_largest(entries, Of::kSource, scratch.largest(), stream), kOp);
  check_launch(
      launch_prologue(entries, prologue, scratch.largest(), scratch.buffers.packed, stream), kOp);
  check_launch(launch_newton_schulz(entries, segments, plan.f16, plan.planes, scratch.largest(),
                                    scratch.buffers, Update(), stream),
               kOp);
  return out;
}

// Matrices have the numbers that place_onchip gave them: in the order of the list.
std::vector<Counter> counters_of(at::TensorList step_counts, at::TensorList params) {
  std::vector<Counter> counters;
  int64_t first = 0;
  for (size_t i = 0; i < params.size(); i++) {
    if (params[i].numel() == 0) continue;
    const at::Tensor& steps = step_counts[i];
    Counter c;
    c.first = first;
    c.count = leading(params[i]);
    c.steps = steps.data_ptr();
    c.type = type_of(steps.scalar_type());
    c.integer = steps.scalar_type() == at::kLong;
    c.each = steps.numel() > 1;
    counters.push_back(c);
    first += c.count;
  }
  return counters;
}

// nonfinite="raise": the one option that waits for the device.
void raise_nonfinite(const std::vector<Entry>& entries, at::TensorList params, Scratch& scratch,
                     void* stream, const char* op) {
  for (const Of of : {Of::kSource, Of::kMomentum}) {
    check_launch(launch_largest(entries, of, scratch.largest(), stream), op);
    const at::Tensor largest = scratch.largest_on_host();
    const int32_t* bits = largest.const_data_ptr<int32_t>();
    for (size_t i = 0; i < params.size(); i++)
      for (int64_t j = 0; params[i].numel() > 0 && j < leading(params[i]); j++)
        TORCH_CHECK_VALUE(uint32_t(*bits++) < kInfinityBits,
                          of == Of::kSource ? "grads[" : "momentum_buffers[", i,
                          "] has a non-finite element (matrix ", j, ")");
  }
}

void muon_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                at::TensorList step_counts, const at::Tensor& skipped, const at::Tensor& lr,
                double momentum, bool nesterov, double weight_decay, at::ArrayRef<double> rows,
                at::ArrayRef<double> scales, c10::string_view method, at::IntArrayRef restarts,
                at::IntArrayRef restart_ends, at::ScalarType compute_dtype, double eps,
                c10::string_view norm, double norm_factor, bool maximize,
                c10::string_view nonfinite) {
  constexpr const char* kOp = "muon_step_";
  count_call(kOp, "cuda");
  check_step(params, grads, step_counts, skipped, lr);
  check_state(momentum_buffers, "momentum_buffers", params, false);
  check_distinct({params, momentum_buffers}, grads);
  TORCH_CHECK_VALUE(scales.size() == params.size(), "scales has ", scales.size(),
                    " entries, params has ", params.size());
  const std::string policy(nonfinite);
  check_one_of(policy, "nonfinite", {"skip", "propagate", "raise"});
  TORCH_CHECK_TYPE(lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble,
                   "lr must be float32 or float64, got ", lr.scalar_type());
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  check_restart_ends(restarts, restart_ends, params.size());
  if (params.empty()) return;
  TORCH_CHECK_VALUE(skipped.device() == params[0].device(), "skipped is on ", skipped.device(),
                    ", the other tensors are on ", params[0].device());
  const c10::DeviceGuard guard(params[0].device());
  std::vector<Entry> entries;
  std::vector<std::vector<int64_t>> cuts;  // one an entry of the table
  for (size_t i = 0; i < params.size(); i++) {
    if (params[i].numel() == 0) continue;
    check_onchip(params[i], kOp);
    append(entries, grads[i], momentum_buffers[i], params[i], float(scales[i]));
    const int64_t begin = i == 0 || restart_ends.empty() ? 0 : restart_ends[i - 1];
    const int64_t end = restart_ends.empty() ? 0 : restart_ends[i];
    cuts.resize(entries.size(), plan.cuts(restarts.slice(size_t(begin), size_t(end - begin))));
  }
  const std::vector<Counter> counters = counters_of(step_counts, params);
  if (entries.empty()) return;
  Scratch scratch(place_onchip(entries, plan.planes), params[0]);
  void* stream = stream_of(params[0]);
  struct Group {
    std::vector<Segment> segments;
    std::vector<Entry> entries;
  };
  std::map<std::vector<int64_t>, Group> groups;  // by their restarts
  for (size_t i = 0; i < entries.size(); i++) {
    Group& group = groups[cuts[i]];
    if (group.segments.empty()) group.segments = plan.segments(cuts[i]);
    group.entries.push_back(entries[i]);
  }

  Prologue prologue;
  prologue.nesterov = nesterov;
  prologue.maximize = maximize;
  prologue.momentum = float(momentum);
  prologue.nonfinite = policy == "skip" ? NonFinite::kSkip : NonFinite::kPropagate;
  prologue.f16 = plan.f16;
  prologue.planes = plan.planes;
  Update update;
  update.in_place = true;
  update.weight_decay = float(weight_decay);
  update.nonfinite = prologue.nonfinite;
  at::Tensor rate;  // kept alive until the kernels are launched
  if (lr.is_cpu()) {
    update.lr = lr.scalar_type() == at::kFloat ? *lr.const_data_ptr<float>()
                                               : float(*lr.const_data_ptr<double>());
  } else {
    rate = lr.to(at::kFloat);
    update.device_lr = rate.const_data_ptr<float>();
  }

  if (policy == "raise") {
    raise_nonfinite(entries, params, scratch, stream, kOp);
  } else {
    for (const Of of : {Of::kSource, Of::kMomentum})
      check_launch(launch_largest(entries, of, scratch.largest(), stream), kOp);
  }
  check_launch(
      launch_prologue(entries, prologue, scratch.largest(), scratch.buffers.packed, stream), kOp);
  for (const auto& item : groups)
    check_launch(
        launch_newton_schulz(item.second.entries, item.second.segments, plan.f16, plan.planes,
                             scratch.largest(), scratch.buffers, update, stream),
        kOp);
  check_launch(launch_count(counters, update.nonfinite, scratch.largest(),
                            static_cast<unsigned long long*>(skipped.data_ptr()), stream),
               kOp);
}

// Inverse roots

// One matrix by an eigendecomposition in fp64, where no iteration is safe or none succeeded.
// reference/inverse_root.py specifies the cut, the residual and when it is accepted.
struct EigenRoot {
  at::Tensor root, residual;
  int64_t status;
};

EigenRoot eigen_root(const at::Tensor& a, const at::Tensor& delta, const at::Tensor& signs, int p,
                     bool after_attempts) {
  constexpr double kUnitRoundoff = 0x1p-24, kUnitRoundoff64 = 0x1p-53;
  const int64_t n = a.size(-1);
  const at::Tensor given = a.to(at::kDouble);
  const at::Tensor symmetric = (given + given.mT()) * 0.5;
  const auto pair = at::linalg_eigh(symmetric);
  const at::Tensor &values = std::get<0>(pair), &vectors = std::get<1>(pair);
  const double cut = std::max(4 * kUnitRoundoff, 4 * double(n) * kUnitRoundoff64);
  const double ridge = delta.item<double>(), least = values[0].item<double>();
  const double largest = std::max(0.0, values[n - 1].item<double>());
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
  check_full_precision(a, "a");
  check_square(a, "a");
  TORCH_CHECK_VALUE(p >= 1 && p <= 8, "p must be in 1..8, got ", p);
  TORCH_CHECK_VALUE(ridge >= 0 && std::isfinite(ridge), "ridge must be at least 0, got ", ridge);
  TORCH_CHECK_VALUE(relative_ridge >= 0 && std::isfinite(relative_ridge),
                    "relative_ridge must be at least 0, got ", relative_ridge);
  const std::string how(method);
  check_one_of(how, "method", {"auto", "iteration", "eigen"});
  TORCH_CHECK_NOT_IMPLEMENTED(how != "eigen", kOp,
                              ": the CUDA C++ kernels iterate; method 'eigen' runs elsewhere");
  const c10::DeviceGuard guard(a.device());
  const auto batch = a.sizes().slice(0, size_t(a.dim() - 2));
  const at::Tensor root =
      at::empty(a.sizes(), a.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor status = at::empty(batch, a.options().dtype(at::kLong));
  const at::Tensor steps = at::empty(batch, a.options().dtype(at::kLong));
  const at::Tensor residual = at::empty(batch, a.options()), delta = at::empty(batch, a.options());
  if (a.numel() == 0) return {root, status, steps, residual, delta};
  check_onchip(a, kOp);
  const int64_t bytes = root_onchip_bytes(int(a.size(-1))),
                limit = shared_memory_limit(std::max(0, int(a.device().index())));
  TORCH_CHECK_NOT_IMPLEMENTED(bytes <= limit, kOp, ": a side of ", a.size(-1), " needs ", bytes,
                              " bytes of shared memory, and this device has ", limit);
  std::vector<Entry> entries;
  append(entries, a, {}, root, 1);
  for (size_t i = 1; i < entries.size(); i++)
    entries[i].first = entries[i - 1].first + entries[i - 1].count;
  const at::Tensor largest = at::zeros({leading(a)}, a.options().dtype(at::kInt));
  uint32_t* bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  RootCall call;
  call.ridge = float(ridge);
  call.relative_ridge = float(relative_ridge);
  call.always = how == "iteration";
  const RootResults results{status.data_ptr<int64_t>(), steps.data_ptr<int64_t>(),
                            residual.data_ptr<float>(), delta.data_ptr<float>()};
  const RootSchedules& schedules = schedules_of(p);
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(a)), kOp);
  check_launch(launch_inverse_root(entries, schedules, call, bits, results, stream_of(a)), kOp);

  // The one wait for the device, for matrices that the iteration does not serve.
  const int64_t n = a.size(-1), count = leading(a);
  const at::Tensor outcomes = status.reshape({count}).cpu();
  const at::Tensor flat_a = a.reshape({count, n, n}), flat_root = root.view({count, n, n});
  at::Tensor signs;
  for (int64_t i = 0; i < count; i++) {
    const int64_t outcome = outcomes.const_data_ptr<int64_t>()[i];
    if (outcome >= 0) continue;
    if (!signs.defined()) {
      std::vector<double> values;
      for (int64_t j = 0; j < n * 8; j++)
        values.push_back(schedules.signs[j / 32] >> j % 32 & 1 ? -1.0 : 1.0);
      signs = at::tensor(values, a.options().dtype(at::kDouble)).view({n, 8});
    }
    const EigenRoot found =
        eigen_root(flat_a[i], delta.reshape({count})[i], signs, int(p), outcome == kRootFailed);
    flat_root[i].copy_(found.root);
    status.view({count})[i].fill_(found.status);
    steps.view({count})[i].zero_();
    residual.view({count})[i].copy_(found.residual);
  }
  return {root, status, steps, residual, delta};
}

}  // namespace

void register_operators(torch::Library& m) {
  m.impl("newton_schulz", &newton_schulz);
  m.impl("inverse_root", &inverse_root);
  m.impl("muon_step_", &muon_step_);
}

}  // namespace spectral_kernels::cuda

#ifndef SPECTRAL_KERNELS_EMULATION
TORCH_LIBRARY_IMPL(spectral_kernels, CUDA, m) { spectral_kernels::cuda::register_operators(m); }
#endif
