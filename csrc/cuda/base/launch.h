// What launches share. A launch_* function returns 0 or a cudaError_t.
#pragma once

#include <atomic>
#include <mutex>

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
template <auto kKernel>
int allow_shared(size_t bytes) {
  return int64_t(bytes) <= emulation::shared_limit ? 0 : 1;
}
inline int launched() { return 0; }
template <auto kKernel>
int fitting_blocks(int, size_t, int& blocks) {
  blocks = emulation::residents + 1;
  return 0;
}
#else
constexpr int kMostDevices = 64;  // whose answers are kept: asking takes a microsecond or two

// Shared memory above 48 KB has to be asked for; what was allowed once stays so.
template <auto kKernel>
int allow_shared(size_t bytes) {
  static std::mutex mutex;
  static size_t allowed[kMostDevices];
  if (bytes <= 48 * 1024) return 0;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const bool keeps = error == cudaSuccess && device < kMostDevices;
  if (error != cudaSuccess || (keeps && bytes <= allowed[device])) return int(error);
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (keeps && error == cudaSuccess) allowed[device] = bytes;
  return int(error);
}
inline int launched() { return int(cudaGetLastError()); }
// Blocks in the clusters that the kernel is compiled for. It may begin while the launch before it
// ends, and waits for that by itself.
template <auto kKernel, class... Arguments>
int launch_clusters(dim3 grid, dim3 block, size_t bytes, void* stream,
                    const Arguments&... arguments) {
  (void)Listed<kKernel>::done;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = cudaStream_t(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  return int(cudaLaunchKernelEx(&config, kKernel, arguments...));
}
#define LAUNCH_CLUSTERS(kernel, grid, block, bytes, stream, ...) \
  launch_clusters<kernel>(grid, block, bytes, stream, __VA_ARGS__)
// How many blocks the current device holds at a time, of always the same size.
template <auto kKernel>
int fitting_blocks(int threads, size_t bytes, int& blocks) {
  static std::atomic<int> kept[kMostDevices];
  int device = 0, each = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  const bool keeps = error == cudaSuccess && device < kMostDevices;
  if (keeps && (blocks = kept[device]) > 0) return 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, bytes);
  blocks = each * multiprocessors;
  if (keeps && error == cudaSuccess) kept[device] = blocks;
  return int(error);
}
#endif

}  // namespace spectral_kernels::cuda
