// Rows N = a + b x + c x² of the coupled inverse-root iteration. Torch-free; the reference is
// python/spectral_kernels/coefficients.py, which also gives the derivations.
#pragma once

#include <vector>

namespace spectral_kernels {

struct RootRow {
  double a, b, c;
};

// Method "auto" decomposes matrices up to this size: rounding errors of two rows do not average
// out, and an iteration has up to three times the error of another one.
constexpr int kMostRootRowsDecomposed = 2;

// The gap 1 - l at which a schedule stops.
double root_tolerance(double unit_roundoff);
// Rows that take the spectrum [low, 1] to [1 - tolerance, 1]: linear ones, then quadratic ones.
std::vector<RootRow> root_schedule(double low, int p, double tolerance);
// Products of matrices that a schedule takes.
int root_products(const std::vector<RootRow>& rows, int p);

}  // namespace spectral_kernels
