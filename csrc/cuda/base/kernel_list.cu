#include <algorithm>

#include "kernel_list.h"
#include "ptx.h"

namespace spectral_kernels::cuda {

std::vector<Kernel>& kernel_list() {
  static std::vector<Kernel> all;
  return all;
}

std::string kernel_name(const std::string& printed) {
  const size_t end = printed.rfind(']');
  std::string name = printed.substr(0, end);
  const size_t arguments = std::min(name.find('<', name.find("kKernel = ")), name.size());
  name = name.substr(name.rfind(':', arguments) + 1);
  for (const auto& [word, number] : {std::pair("true", "1"), std::pair("false", "0")})
    for (size_t at; (at = name.find(word)) != std::string::npos;)
      name.replace(at, std::string(word).size(), number);
  return name;
}

#ifndef CUDA_EMULATION
std::vector<KernelFacts> kernel_facts(int device) {
  int before = 0;
  const bool present =
      cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  std::vector<KernelFacts> facts;
  for (const Kernel& kernel : kernel_list()) {
    cudaFuncAttributes found;
    const bool known = present && cudaFuncGetAttributes(&found, kernel.function) == cudaSuccess;
    facts.push_back(
        {kernel.name, known ? found.numRegs : -1, known ? int(found.localSizeBytes) : -1});
  }
  if (present) cudaSetDevice(before);
  cudaGetLastError();  // a caller that goes on must not see it again
  std::sort(facts.begin(), facts.end(),
            [](const KernelFacts& a, const KernelFacts& b) { return a.name < b.name; });
  return facts;
}
#endif

}  // namespace spectral_kernels::cuda
