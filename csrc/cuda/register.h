// The operators of register.cpp, for the two libraries that hold them: the extension, under the
// dispatch key CUDA, and the emulation in tests/cuda_emulation.
#pragma once

namespace torch {
class Library;
}

namespace spectral_kernels::cuda {

void register_operators(torch::Library& library);
// Parts of it.
void register_kron_factor(torch::Library& library);
void register_newton_schulz(torch::Library& library);
void register_eigenbasis(torch::Library& library);
void register_deva(torch::Library& library);

}  // namespace spectral_kernels::cuda
