// The eigenvalues of diag(d) + rho z zᵀ, as the zeros of 1 / rho + sum of z_j² / (d_j - x).
#pragma once

#include <cstdint>

namespace spectral_kernels::cpu {

// A zero as its distance from a pole, which is what subtraction would round away.
struct SecularRoot {
  int64_t origin;  // the pole's number
  double mu;       // the zero is d[origin] + mu
};

// Zero i < k of k >= 2: the one above d[i]. d ascends strictly, rho > 0, z2 are the squares of z,
// none of them 0.
SecularRoot secular_root(int64_t i, int64_t k, const double* d, const double* z2, double rho);

}  // namespace spectral_kernels::cpu
