// Properties of a device, for files that do not know torch.
#pragma once

#include <cstdint>
#include <string_view>

namespace spectral_kernels::cuda {

// The sentence of an error that a launch_* function returned.
const char* error_text(int error);
// Shared memory that one block may have on a device, in bytes; 0 if there is no such device.
int64_t shared_memory_limit(int device);
// Multiprocessors of the largest card of a device's architecture, which is what schedules are made
// for: bits must not depend on the card. 132 if there is no such device.
int multiprocessors_of_kind(int device);
// Whether a list of built architectures, as "80,90a", has the one with wgmma: plain 90 is without.
bool names_wgmma(std::string_view architectures);
// Multiprocessors of a device whose processors have wgmma and that this library holds the machine
// code for, if the switch of that name is on; else 0.
int wgmma_multiprocessors(int device);

}  // namespace spectral_kernels::cuda
