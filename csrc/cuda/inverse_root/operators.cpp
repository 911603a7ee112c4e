// inverse_root on CUDA tensors.

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../../root_results.h"
#include "../../root_rows.h"
#include "../../tensor.h"
#include "../base/list_step.h"
#include "../base/slices.h"
#include "../base/tensors.h"
#include "../eigenbasis/jacobi.h"
#include "eigen_root.h"
#include "iteration.h"

namespace spectral_kernels::cuda {
namespace {

void check_square_onchip(const Tensor& a, const char* op) {
  check_full_precision(a, "a");
  check_square(a, "a");
  check_not_double(a, op);
  CHECK_IMPLEMENTED(a.size(-1) <= kMostRootRows, op,
                    ": the CUDA C++ kernels take matrices with a side of at most ", kMostRootRows,
                    ", got shape ", a.sizes());
}

constexpr int64_t kMostVectorBytes = 64 << 20;

const RootSchedules& schedules_of(int64_t p) {
  static const std::array<RootSchedules, 8> all = [] {
    std::array<RootSchedules, 8> out;
    for (int i = 0; i < 8; i++) out[size_t(i)] = root_schedules(i + 1);
    return out;
  }();
  return all[size_t(p - 1)];
}

RootTuple inverse_root(const Tensor& a, int64_t p, double ridge, double relative_ridge,
                       const std::string& method) {
  constexpr const char* kOp = "inverse_root";
  count_call(kOp, "cuda");
  check_square_onchip(a, kOp);
  CHECK_VALUE(p >= 1 && p <= 8, "p must be in 1..8, got ", p);
  CHECK_VALUE(ridge >= 0 && std::isfinite(ridge), "ridge must be at least 0, got ", ridge);
  CHECK_VALUE(relative_ridge >= 0 && std::isfinite(relative_ridge),
              "relative_ridge must be at least 0, got ", relative_ridge);
  const std::string how(method);
  check_one_of(how, "method", {"auto", "iteration", "eigen"});
  const DeviceGuard guard(a.device());
  const RootTensors out(a);
  if (a.numel() == 0) return out;
  const int side = int(a.size(-1));
  const int64_t bytes = std::max(root_onchip_bytes(side), jacobi_bytes(side)),
                limit = shared_memory_of(a);
  CHECK_IMPLEMENTED(bytes <= limit, kOp, ": a side of ", a.size(-1), " needs ", bytes,
                    " bytes of shared memory, and this device has ", limit);
  std::vector<Entry> entries;
  append(entries, a, {}, out.root, 1);
  number(entries);
  const Tensor largest = zeros({leading(a)}, a, kInt);
  uint32_t* bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  RootCall call;
  call.ridge = float(ridge);
  call.relative_ridge = float(relative_ridge);
  call.always = how == "iteration";
  call.never = how == "eigen" || (how == "auto" && side <= kMostRootRowsDecomposed);
  const RootResults results{out.status.data_ptr<int64_t>(), out.steps.data_ptr<int64_t>(),
                            out.residual.data_ptr<float>(), out.delta.data_ptr<float>()};
  const RootSchedules& schedules = schedules_of(p);
  check_launch(launch_largest(entries, Of::kSource, bits, stream_of(a)), kOp);
  check_launch(launch_inverse_root(entries, schedules, call, bits, results, stream_of(a)), kOp);

  // What the iteration does not serve, so many matrices at a time that their vectors stay small.
  const int64_t n = a.size(-1), most = std::max<int64_t>(1, kMostVectorBytes / (n * n * 8));
  const Tensor values = empty({leading(a), n}, a, kDouble);
  const Tensor vectors = empty({std::min(leading(a), most), n, n}, a, kDouble);
  const Tensor sweeps = empty({leading(a)}, a, kLong);
  const EigenResults eigen{values.data_ptr<double>(), vectors.data_ptr<double>(),
                           sweeps.data_ptr<int64_t>()};
  const auto bytes_of_vectors = [&](const Entry&) { return n * n * 8; };
  in_slices(entries, kMostVectorBytes, bytes_of_vectors, [&](std::vector<Entry> part) {
    int64_t placed = 0;
    for (Entry& e : part) {
      e.square = placed * n * n;
      placed += e.count;
    }
    check_launch(launch_eigenbasis(part, bits, results.status, eigen, stream_of(a)), kOp);
    check_launch(launch_eigen_root(part, schedules, eigen, results, stream_of(a)), kOp);
  });
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) { m.impl("inverse_root", &boxed<&inverse_root>); }

}  // namespace spectral_kernels::cuda
