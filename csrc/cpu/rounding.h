// State in bfloat16: widened to fp32 for a step, and rounded at random after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

// Scratch for a matrix in fp32, its lines contiguous as those of `narrow` are.
size_t wide_bytes(const Matrix& narrow);
Matrix take_wide(Workspace& workspace, const Matrix& narrow);
void widen(const Matrix& narrow, const Matrix& wide, int threads);

// Every element becomes one of the two bfloat16 numbers around it, the upper one with the
// probability that makes its mean the element itself. What is random is a function of `step`, row,
// column and the lower of the two: 16 bits r of a hash, and the element is truncated after r has
// been added to the 16 bits that bfloat16 lacks. Finite numbers stay finite.
void round_at_random(const Matrix& wide, uint64_t step, const Matrix& narrow, int threads);

// Moments of one matrix for the length of a step: fp32 copies stand in the place of those that are
// kept in bfloat16. What was kept is written by round_back() alone.
class Widened {
 public:
  Widened(std::initializer_list<Matrix*> moments, int threads);
  // After `count` steps before this one.
  void round_back(double count) const;
  static size_t bytes(std::initializer_list<Matrix> moments);

 private:
  struct Copy {
    Matrix narrow, wide;
  };
  Workspace workspace_;
  std::vector<Copy> copies_;
  int threads_;
};

// The matrix as it is during a step, to reckon with.
inline Matrix in_full(Matrix moment) {
  if (moment.dtype == DType::kBF16) moment.dtype = DType::kF32;
  return moment;
}

}  // namespace spectral_kernels::cpu
