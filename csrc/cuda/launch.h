// What launches share. A launch_* function returns 0 or a cudaError_t.
#pragma once

#include "ptx.h"

namespace spectral_kernels::cuda {

#ifdef CUDA_EMULATION
template <class Kernel>
int allow_shared(Kernel, size_t bytes) {
  return int64_t(bytes) <= emulation::shared_limit ? 0 : 1;
}
inline int launched() { return 0; }
#else
// Shared memory above 48 KB has to be asked for.
template <class Kernel>
int allow_shared(Kernel kernel, size_t bytes) {
  return bytes <= 48 * 1024 ? 0
                            : int(cudaFuncSetAttribute(
                                  kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}
inline int launched() { return int(cudaGetLastError()); }
#endif

}  // namespace spectral_kernels::cuda
