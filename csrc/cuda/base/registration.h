// How a family's operators.cpp registers its functions:
//
//   SPECTRAL_KERNELS_CUDA_OPERATORS(m) { m.impl("gram", &gram); }
//
// in the extension under the dispatch key CUDA, and in tests/cuda_emulation, which defines
// SPECTRAL_KERNELS_EMULATION, for CPU tensors in a library of its own.
#pragma once

#include <torch/library.h>

#ifdef SPECTRAL_KERNELS_EMULATION
#define SPECTRAL_KERNELS_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(spectral_kernels_emulated, CPU, m)
#else
#define SPECTRAL_KERNELS_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(spectral_kernels, CUDA, m)
#endif
