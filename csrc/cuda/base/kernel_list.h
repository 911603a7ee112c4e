// The kernels of this library by name. Every launch puts its kernel on the list when the library is
// loaded, so that the list can miss none.
#pragma once

#include <string>
#include <vector>

namespace spectral_kernels::cuda {

struct Kernel {
  std::string name;  // such as "gram_kernel<8, 1, 0>"
  const void* function;
};
std::vector<Kernel>& kernel_list();

// As the compiler prints a function with the template argument kKernel.
std::string kernel_name(const std::string& printed);

template <auto kKernel>
struct Listed {
  static bool add() {
    kernel_list().push_back(
        {kernel_name(__PRETTY_FUNCTION__), reinterpret_cast<const void*>(kKernel)});
    return true;
  }
  static const bool done;
};
template <auto kKernel>
const bool Listed<kKernel>::done = Listed<kKernel>::add();

// What a kernel takes on a device; negative where there is no such device.
struct KernelFacts {
  std::string name;
  int registers, local_bytes;  // a thread; local memory is where registers are spilled to
};
std::vector<KernelFacts> kernel_facts(int device);

}  // namespace spectral_kernels::cuda
