// How a family registers its functions:
//
//   SPECTRAL_KERNELS_CPU_OPERATORS(m) { m.impl("gram", &boxed<&gram>); }
//
// and the same with CUDA, in the extension under the dispatch key CUDA and in tests/cuda_emulation,
// which defines SPECTRAL_KERNELS_EMULATION, for CPU tensors in a library of its own.
#pragma once

#include <torch/csrc/stable/library.h>

#include "boxing.h"

#define SPECTRAL_KERNELS_CPU_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m)

#ifdef SPECTRAL_KERNELS_EMULATION
#define SPECTRAL_KERNELS_CUDA_OPERATORS(m) \
  STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_emulated, CPU, m)
#else
#define SPECTRAL_KERNELS_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(spectral_kernels, CUDA, m)
#endif
