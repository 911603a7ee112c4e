// Rows N = a + b x + c x² of the coupled inverse-root iteration. Torch-free; the reference is
// python/spectral_kernels/coefficients.py, which also gives the derivations.
#pragma once

#include <vector>

namespace spectral_kernels {

struct RootRow {
  double a, b, c;
  double d = 0, e = 0;  // of x³ and x⁴, in long rows only
};

// The gap 1 - l at which a schedule from `low` stops.
double root_tolerance(double low, double unit_roundoff);
// Rows that take the spectrum [low, 1] to [1 - tolerance, 1]: two linear, the rest quadratic.
std::vector<RootRow> root_schedule(double low, int p, double tolerance);
// The same with rows of degree 4 where that saves products: such a row costs two (M², and M² times
// a combination), a quadratic one costs one, and the rest of a step, N^p M and N X, is the same for
// both. Condition 1e6 and p = 4 take 23 to 26 products instead of 30, with the same error. Not for
// p = 1, where the error would be up to 2.5 times as large.
std::vector<RootRow> short_root_schedule(double low, int p, double tolerance);
// Products of matrices that a schedule takes.
int root_products(const std::vector<RootRow>& rows, int p);

}  // namespace spectral_kernels
