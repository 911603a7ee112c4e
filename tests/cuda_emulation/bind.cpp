// The operators of csrc/cuda on CPU tensors, run by the emulation:
// torch.ops.spectral_kernels_emulated has the schemas of torch.ops.spectral_kernels.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "../../csrc/cuda/register.h"
#include "../../csrc/cuda/two_sided.h"
#include "emulation.h"

extern "C" void set_emulation(int order, int truncation, const char* left_out, int64_t limit,
                              int residents) {
  emulation::shared_limit = limit;
  emulation::residents = residents;
  emulation::set_order(order);
  emulation::set_truncation(truncation != 0);
  emulation::left_out = left_out;
}

extern "C" void limit_workspace(int64_t bytes) { spectral_kernels::cuda::limit_workspace(bytes); }

TORCH_LIBRARY(spectral_kernels_emulated, m) {
  for (const char* op : SPECTRAL_KERNELS_EMULATED_OPERATORS)
    m.def(c10::Dispatcher::singleton()
              .findSchemaOrThrow((std::string("spectral_kernels::") + op).c_str(), "")
              .schema()
              .cloneWithName(std::string("spectral_kernels_emulated::") + op, ""));
}

TORCH_LIBRARY_IMPL(spectral_kernels_emulated, CPU, m) {
  spectral_kernels::cuda::register_operators(m);
}
