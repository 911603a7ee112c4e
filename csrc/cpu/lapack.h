// LAPACK through torch, with the same bits for any number of threads. MKL's threaded factorizations
// round differently on one and on two threads. So every call is made from an active parallel region
// of at least two threads, one matrix a thread, with MKL itself set to one.
#pragma once

#include <cstdint>
#include <functional>

#include "tiles.h"

namespace spectral_kernels::cpu {

// Calls job(i) for i in [0, jobs) inside such a region. Jobs must not throw.
void lapack_jobs(int64_t jobs, const std::function<void(int64_t)>& job);

// From within a job. `a` is a contiguous row-major fp64 matrix. False if LAPACK did not converge.
// A = V diag(values) Vᵀ, values ascending, V row-major; A may be overwritten.
bool eigh(int64_t n, double* a, double* values, double* vectors);
// The orthogonal factor of A = Q R, with a non-negative diagonal of R.
bool householder_q(int64_t n, double* a, double* q);
// The polar factor of an m x n matrix on the singular values above `threshold` times the largest.
bool svd_polar(int64_t m, int64_t n, const double* a, double threshold, double* out);

}  // namespace spectral_kernels::cpu
