// What launches share. A launch_* function returns 0 or a cudaError_t.
#pragma once

#include "ptx.h"

#ifndef CUDA_EMULATION
#include "kernel_list.h"
// `kernel` is a constant: its name goes on the list.
#define LAUNCH(kernel, grid, block, bytes, stream, ...)  \
  ((void)::spectral_kernels::cuda::Listed<kernel>::done, \
   kernel<<<grid, block, bytes, (cudaStream_t)(stream)>>>(__VA_ARGS__))
#endif

namespace spectral_kernels::cuda {

#ifdef CUDA_EMULATION
template <class Kernel>
int allow_shared(Kernel, size_t bytes) {
  return int64_t(bytes) <= emulation::shared_limit ? 0 : 1;
}
inline int launched() { return 0; }
template <class Kernel>
int fitting_blocks(Kernel, int, size_t, int& blocks) {
  blocks = emulation::residents + 1;
  return 0;
}
#else
// Shared memory above 48 KB has to be asked for.
template <class Kernel>
int allow_shared(Kernel kernel, size_t bytes) {
  return bytes <= 48 * 1024 ? 0
                            : int(cudaFuncSetAttribute(
                                  kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}
inline int launched() { return int(cudaGetLastError()); }
// How many blocks the current device holds at a time.
template <class Kernel>
int fitting_blocks(Kernel kernel, int threads, size_t bytes, int& blocks) {
  int device = 0, each = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, bytes);
  blocks = each * multiprocessors;
  return int(error);
}
#endif

}  // namespace spectral_kernels::cuda
