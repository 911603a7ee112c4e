#include <algorithm>

#include "device.h"
#include "switches.h"

#ifndef CUDA_EMULATION
#include <cuda_runtime.h>

#ifndef SPECTRAL_KERNELS_CUDA_ARCHITECTURES
#define SPECTRAL_KERNELS_CUDA_ARCHITECTURES ""  // a file compiled by itself
#endif
#endif

namespace spectral_kernels::cuda {
namespace {

#ifndef CUDA_EMULATION
int attribute(cudaDeviceAttr which, int device, int otherwise) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) == cudaSuccess) return value;
  cudaGetLastError();  // a caller that goes on must not see it again
  return otherwise;
}

int capability(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device, 9) * 10 +
         attribute(cudaDevAttrComputeCapabilityMinor, device, 0);
}
#endif

}  // namespace

bool names_wgmma(std::string_view architectures) {
  for (size_t begin = 0; begin <= architectures.size();) {
    const size_t end = std::min(architectures.find(',', begin), architectures.size());
    if (architectures.substr(begin, end - begin) == "90a") return true;
    begin = end + 1;
  }
  return false;
}

#ifdef CUDA_EMULATION
const char* error_text(int) { return "emulated launch failed"; }
int64_t shared_memory_limit(int) { return emulation::shared_limit; }
int multiprocessors_of_kind(int) { return emulation::multiprocessors; }
int wgmma_multiprocessors(int) { return switches().wgmma ? emulation::multiprocessors : 0; }
#else
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int64_t shared_memory_limit(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, 0);
}

int wgmma_multiprocessors(int device) {
  return switches().wgmma && names_wgmma(SPECTRAL_KERNELS_CUDA_ARCHITECTURES) &&
                 capability(device) == 90
             ? attribute(cudaDevAttrMultiProcessorCount, device, 132)
             : 0;
}

int multiprocessors_of_kind(int device) {
  switch (capability(device)) {
    case 80:
      return 108;
    case 86:
      return 84;
    case 89:
      return 142;
    case 100:
      return 148;
    case 120:
      return 188;
    default:
      return 132;
  }
}
#endif

}  // namespace spectral_kernels::cuda
