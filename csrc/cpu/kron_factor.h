// Kronecker factors: accumulation and two-sided preconditioning, on packed gradients.
#pragma once

#include "product.h"
#include "tiles.h"

namespace spectral_kernels::cpu {

// What factors of a gradient are formed in: a bf16 gradient is an exact operand of the 16-bit dot
// products, which accumulate in fp32; everything else takes the factor's own precision.
Kind factor_kind(DType grad, DType factor);

// True if beta factor + weight XᵀX has an element that is not finite, or the factor has (its lower
// triangle, which is what is read); X is packed and its largest
// element is `largest` (NaN if one is not finite).
bool overflows(const Panels& x, double largest, double beta, double weight, const Matrix& factor);

// factor <- beta factor + weight XᵀX, with X packed (k x n); both triangles, exactly equal.
void accumulate(const Panels& x, double beta, double weight, const Matrix& factor, int threads);

// left @ x @ right for packed operands. Absent sides are identities.
struct TwoSided {
  Panels left_t;  // leftᵀ (m x p)
  Panels x, x_t;  // x (m x n) and xᵀ; which of them are needed is said by needs_x(), needs_x_t()
  Panels right;   // n x q
};
struct TwoSidedShape {
  int64_t m, n, p, q;
  bool has_left, has_right;

  bool left_first() const;  // (left x) right, else left (x right)
  bool needs_x() const;
  bool needs_x_t() const;
  // Whether packing would cost more than it saves. Products are `whole` then, so that it does not
  // matter for the bits whether the operands can be read in place.
  bool small(Kind kind) const;
  size_t workspace_bytes(Kind kind) const;  // of precondition(), for its intermediate
};
// Writes the result through `last`, whose operands are filled in here; at least one side is
// present.
void precondition(const TwoSidedShape& shape, const TwoSided& operands, Product last,
                  Workspace& workspace, int threads);

}  // namespace spectral_kernels::cpu
