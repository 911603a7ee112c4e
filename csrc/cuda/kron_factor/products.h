// Products in full precision of lists of matrices of any shape and strides: what rotations,
// preconditioning and Kronecker factors are made of. Operands are held in fp16, those in fp32 as
// two planes: what is 2^-37 of a matrix's largest element and less is lost.
#pragma once

#include <vector>

#include "../../tensor.h"
#include "../base/list_step.h"
#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

// out <- left x right, with x and out (..., m, n), left (..., m, m), right (..., n, n) of one
// batch; a side that is undefined or of size 0 is the identity. A matrix is NaN where an operand is
// not finite. What lies between x and out has a scale of its own and overflows only if out does.
struct TwoSided {
  Tensor x, left, right, out;
};
void two_sided(const std::vector<TwoSided>& list, const char* op);

// out <- beta factor + weight x xᵀ (`rows`), or xᵀ x, exactly symmetric: of the factor the lower
// triangle counts, and `out` may be the factor. A matrix is NaN where x is not finite.
struct Accumulate {
  Tensor x;
  bool rows;
  Tensor factor, out;
  double beta, weight;
};
void accumulate(const std::vector<Accumulate>& list, const char* op);

// The same in two parts, between which more can be marked as not finite.
class Accumulation {
 public:
  Accumulation(const std::vector<Accumulate>& list, const char* op);
  // Skips what is not finite, or makes it NaN.
  void run(NonFinite nonfinite) const;
  uint32_t* largest_bits() const { return reinterpret_cast<uint32_t*>(largest.data_ptr()); }

  std::vector<Entry> entries;  // x or xᵀ as source, the factor as momentum, numbered in order
  Tensor largest;              // bits of max |x|, one a matrix

 private:
  void run(const std::vector<Entry>& list, int planes, NonFinite nonfinite) const;

  const char* op_;
};

}  // namespace spectral_kernels::cuda
