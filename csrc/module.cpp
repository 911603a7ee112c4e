// The small non-tensor surface: what was built, what runs, counters, workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <array>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "counters.h"
#include "cpu/eigen/eigen.h"
#include "cpu/inverse_root/pole_sum.h"
#include "cpu/isa/select.h"
#include "cpu/lapack.h"
#include "cpu/tiles.h"
#include "cpu/workspace.h"
#include "errors.h"
#include "root_rows.h"
#ifdef SPECTRAL_KERNELS_CUDA_ARCHITECTURES
#include "cuda/base/device.h"
#include "cuda/base/kernel_list.h"
#include "cuda/base/switches.h"
#include "cuda/newton_schulz/segments.h"
#endif

namespace {

// GFLOP/s of multiply-adds on the calling thread, by the instruction set in use.
double fma_peak(const std::string& kind, double milliseconds) {
  using spectral_kernels::cpu::kernels;
  const int index = kind == "fp32" ? 0 : kind == "fp64" ? 1 : kind == "bf16" ? 2 : -1;
  if (index < 0) throw std::invalid_argument("kind must be fp32, fp64 or bf16, not '" + kind + "'");
  const auto work = kernels().multiply_adds[index];
  if (work == nullptr) return 0;
  constexpr int64_t kRounds = 2000;
  double flops = 0, seconds = 0;
  const auto start = std::chrono::steady_clock::now();
  do {
    flops += work(kRounds);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  } while (seconds * 1e3 < milliseconds);
  return flops / seconds * 1e-9;
}

#ifdef SPECTRAL_KERNELS_CUDA_ARCHITECTURES
bool cuda_rows_fit(const std::vector<std::array<double, 3>>& rows, double norm_factor) {
  std::vector<spectral_kernels::cuda::Rows> given;
  for (const auto& row : rows) given.push_back({row[0], row[1], row[2]});
  std::vector<spectral_kernels::cuda::Segment> segments;
  return spectral_kernels::cuda::plan_segments(given, {}, true, false, norm_factor, 0, segments);
}
#endif

}  // namespace

// torch's own number of threads, which its stable interface cannot set: MKL's, OpenMP's and that of
// threads which ask for the first time.
void spectral_kernels::cpu::set_torch_threads(int threads) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::module_::import("torch").attr("set_num_threads")(threads);
}

PYBIND11_MODULE(_C, m) {
  using namespace spectral_kernels;
  cpu::set_has_mkl(pybind11::module_::import("torch._C").attr("has_mkl").cast<bool>());
  m.doc() = "Compiled part of spectral_kernels; operators are in torch.ops.spectral_kernels.";
  m.attr("built_with_torch") = TORCH_VERSION;
  m.attr("least_torch") =
      text_of(TORCH_TARGET_VERSION >> 56, ".", TORCH_TARGET_VERSION >> 48 & 0xff);
  m.attr("compiler") = __VERSION__;
#ifdef SPECTRAL_KERNELS_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = SPECTRAL_KERNELS_CUDA_ARCHITECTURES;
  m.def("cuda_shared_memory", &cuda::shared_memory_limit, pybind11::arg("device"),
        "Bytes of shared memory that one block may have; 0 without such a device.");
  m.def(
      "cuda_prefer_wgmma", [](bool on) { cuda::switches().wgmma = on; }, pybind11::arg("on"),
      "Products of large 16-bit matrices by wgmma on sm_90, which no card has run yet.");
  m.def(
      "cuda_prefer_queue", [](std::optional<bool> on) { cuda::switches().queue = on; },
      pybind11::arg("on"),
      "All products of large matrices in one launch (True), in one each (False), or as the cost "
      "model says (None). No bit depends on it.");
  m.def("cuda_rows_fit", &cuda_rows_fit, pybind11::arg("rows"), pybind11::arg("norm_factor"),
        "Whether the on-chip kernels can hold the numbers that these coefficients lead to.");
  m.def(
      "cuda_kernels",
      [](int device) {
        std::vector<std::tuple<std::string, int, int>> rows;
        for (const cuda::KernelFacts& k : cuda::kernel_facts(device))
          rows.emplace_back(k.name, k.registers, k.local_bytes);
        return rows;
      },
      pybind11::arg("device"),
      "(name, registers, bytes of local memory a thread) of all kernels; -1 without such a "
      "device.");
#else
  m.attr("cuda_architectures") = "";
#endif
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("supported_isas", &cpu::supported_isas);
  m.def("refused_isas", &cpu::refused_isas, "(name, reason) of the compiled sets that do not run.");
  m.def("current_isa", [] { return std::string(cpu::kernels().name); });
  m.def("fp32_products", [] { return std::string(cpu::kernels().fp32); });
  m.def("set_isa_cap", &cpu::set_isa_cap, pybind11::arg("name"),
        "Use the best instruction set up to `name`; '' goes back to the environment's choice.");
  m.def("fma_peak", &fma_peak, pybind11::arg("kind"), pybind11::arg("milliseconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "GFLOP/s of fp32, fp64 or bf16 multiply-adds on this thread; 0 where there are no "
        "instructions.");
  m.def(
      "root_products",
      [](double low, int p, double unit_roundoff) {
        using namespace spectral_kernels;
        return root_products(root_schedule(low, p, root_tolerance(unit_roundoff)), p);
      },
      pybind11::arg("low"), pybind11::arg("p"), pybind11::arg("unit_roundoff"),
      "Products of matrices in the CPU kernels' inverse root of a spectrum that ends at `low`.");
  m.def(
      "root_poles",
      [](double low, int p, int64_t n) {
        const cpu::Poles* poles = cpu::poles_for(low, p, n, cpu::Kind::kF32);
        return poles ? cpu::pole_count(*poles) : 0;
      },
      pybind11::arg("low"), pybind11::arg("p"), pybind11::arg("n"),
      "Inverses in the CPU kernels' fp32 inverse root of order n; 0 where it iterates.");
  m.def("call_counts", &call_counts);
  m.def("reset_call_counts", &reset_call_counts);
  m.def("fault_counts", &fault_counts,
        "Decompositions that were wrong and computed again: routine -> how many; "
        "\"routine/again\" where the second was wrong too.");
  m.def("faults", &faults, "The sum of fault_counts().");
  m.def("mkl_thread_limit", &cpu::mkl_thread_limit);
  m.def("corrupt_lapack", &cpu::corrupt_lapack, pybind11::arg("results"),
        "For tests: the next so many results of LAPACK are wrong.");
  m.def("set_eigen_route", &cpu::set_eigen_route, pybind11::arg("route"),
        "For tests: \"own\" or \"lapack\" for every eigendecomposition, \"auto\" for the faster.");
  m.def("hide_mkl_switch", &cpu::hide_mkl_switch, pybind11::arg("on"),
        "For tests: as if MKL did not show the switch of a thread's number of threads.");
  m.def("mkl_threads_of_workers", &cpu::mkl_threads_of_workers,
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "For tests: the number of threads that MKL would take on each worker of LAPACK's jobs.");
  m.def("set_workspace_limit", &cpu::set_workspace_limit, pybind11::arg("bytes"));
  m.def("workspace_limit", &cpu::workspace_limit);
  m.def("workspace_kept", &cpu::workspace_kept);
  m.def("workspace_peak", &cpu::workspace_peak);
  m.def("reset_workspace_peak", &cpu::reset_workspace_peak);
  m.def("release_workspace", &cpu::release_workspace);
  m.def("poison_workspace", &cpu::poison_workspace, pybind11::arg("on"));
  m.def("fail_workspace", &cpu::fail_workspace, pybind11::arg("count"),
        "For tests: `count` requests for scratch memory are granted and the next one fails, once.");
}
