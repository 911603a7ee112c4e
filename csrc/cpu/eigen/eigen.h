// Eigendecomposition of symmetric matrices in fp64, with the same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral_kernels::cpu {

// A = sum of values_k v_k v_kᵀ, values ascending; v_k is row k of `vectors`. `a` is row by row,
// exactly symmetric and finite. By our own kernels, on all threads, where those are faster than
// LAPACK on one thread, else by LAPACK. What does not multiply to A is computed once more, by
// LAPACK, and counted. False if that did not converge either.
bool eigendecompose(int64_t n, const double* a, double* values, double* vectors, int threads);
// Scratch memory beside that of LAPACK.
size_t eigen_bytes(int64_t n);

// Which way the matrices of tests go from now on: "own", "lapack", or "auto" for the faster one.
void set_eigen_route(const char* route);

}  // namespace spectral_kernels::cpu
