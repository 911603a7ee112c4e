// What there is to know about a device without torch.
#pragma once

#include <cstdint>

namespace spectral_kernels::cuda {

// The sentence of an error that a launch_* function returned.
const char* error_text(int error);
// Shared memory that one block may have on a device, in bytes; 0 if there is no such device.
int64_t shared_memory_limit(int device);

}  // namespace spectral_kernels::cuda
