#include "device.h"

#ifndef CUDA_EMULATION
#include <cuda_runtime.h>
#endif

namespace spectral_kernels::cuda {

#ifdef CUDA_EMULATION
const char* error_text(int) { return "emulated launch failed"; }
int64_t shared_memory_limit(int) { return 227 * 1024; }
#else
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int64_t shared_memory_limit(int device) {
  int bytes = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) cudaGetLastError();  // a caller that goes on must not see it again
  return error == cudaSuccess ? bytes : 0;
}
#endif

}  // namespace spectral_kernels::cuda
