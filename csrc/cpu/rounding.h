// State in bfloat16: widened to fp32 for a step, and rounded at random after it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

// Scratch for a matrix in fp32, its lines contiguous as those of `narrow` are.
size_t wide_bytes(const Matrix& narrow);
Matrix take_wide(Workspace& workspace, const Matrix& narrow);
void widen(const Matrix& narrow, const Matrix& wide, int threads);

// Every element becomes one of the two bfloat16 numbers around it, the upper one with the
// probability that makes its mean the element itself. What is random is a function of `step`, row
// and column alone: 16 bits r of a hash, and the element is truncated after r has been added to the
// 16 bits that bfloat16 lacks. Finite numbers stay finite.
void round_at_random(const Matrix& wide, uint64_t step, const Matrix& narrow, int threads);

}  // namespace spectral_kernels::cpu
