// The small non-tensor surface: what was built, what runs, counters, workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "counters.h"
#include "cpu/isa/select.h"
#include "cpu/tiles.h"
#include "cpu/workspace.h"

PYBIND11_MODULE(_C, m) {
  using namespace spectral_kernels;
  m.doc() = "Compiled part of spectral_kernels; operators are in torch.ops.spectral_kernels.";
  m.attr("built_with_torch") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("supported_isas", &cpu::supported_isas);
  m.def("current_isa", [] { return std::string(cpu::kernels().name); });
  m.def("set_isa_cap", &cpu::set_isa_cap, pybind11::arg("name"),
        "Use the best instruction set up to `name`; '' goes back to the environment's choice.");
  m.def("call_counts", &call_counts);
  m.def("reset_call_counts", &reset_call_counts);
  m.def("set_workspace_limit", &cpu::set_workspace_limit, pybind11::arg("bytes"));
  m.def("workspace_limit", &cpu::workspace_limit);
  m.def("workspace_kept", &cpu::workspace_kept);
  m.def("workspace_peak", &cpu::workspace_peak);
  m.def("reset_workspace_peak", &cpu::reset_workspace_peak);
  m.def("release_workspace", &cpu::release_workspace);
  m.def("poison_workspace", &cpu::poison_workspace, pybind11::arg("on"));
}
