// Rows N = a + b x + c x² of the coupled inverse-root iteration. Torch-free; the reference is
// python/spectral_kernels/coefficients.py, which also gives the derivations.
#pragma once

#include <vector>

namespace spectral_kernels {

struct RootRow {
  double a, b, c;
};

// The gap 1 - l at which a schedule from `low` stops.
double root_tolerance(double low, double unit_roundoff);
// Rows that take the spectrum [low, 1] to [1 - tolerance, 1]: two linear, the rest quadratic.
std::vector<RootRow> root_schedule(double low, int p, double tolerance);

}  // namespace spectral_kernels
