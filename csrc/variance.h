// The variances of DeVA, for code with and without torch.
#pragma once

namespace spectral_kernels {

// What V is made of, and what is compared with it.
enum class Variance : int { kMomentum, kGradient, kInstant, kLowMemory, kNone };

}  // namespace spectral_kernels
