// LAPACK through torch, with the same bits for any number of threads. MKL's threaded factorizations
// round differently on one and on two threads. So every call is made from an active parallel region
// of at least two threads, one matrix a thread, with MKL itself set to one. What comes back is
// multiplied out on a few probes; what does not fit is computed once more, and counted.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "tiles.h"

namespace spectral_kernels::cpu {

// Calls job(i) for i in [0, jobs) inside such a region, then once more, on the calling thread and
// with that thread alone, those that returned false. `routine` is what they are counted under. Jobs
// must not throw, and what they read must stay as it is.
void lapack_jobs(const char* routine, int64_t jobs, const std::function<bool(int64_t)>& job);

// From within a job. `a` is a contiguous row-major fp64 matrix. False if LAPACK did not converge,
// or returned what does not multiply to A. Row j of `vectors` is the eigenvector of values[j];
// values ascend.
bool eigh(int64_t n, const double* a, double* values, double* vectors);
// The polar factor of an m x n matrix on the singular values above `threshold` times the largest.
bool svd_polar(int64_t m, int64_t n, const double* a, double threshold, double* out);

// How MKL is kept to one thread here: "switch", "calling thread" where it hides its switch, or
// "none" where torch has no MKL.
const char* mkl_thread_limit();

// Whether torch was built with MKL.
void set_has_mkl(bool has);
// torch.set_num_threads, by Python: see module.cpp.
void set_torch_threads(int threads);

// For tests. The next `results` results are made wrong: the columns change places, which no test of
// orthogonality sees.
void corrupt_lapack(int64_t results);
void corrupt_columns(double* matrix, int64_t rows, int64_t columns);  // if this is one of them
// As if MKL hid its switch.
void hide_mkl_switch(bool on);
// Holds all workers at a barrier, and says for how many threads MKL would split its work on each;
// -1 where it does not tell, and nothing if they do not all arrive within ten seconds.
std::vector<int> mkl_threads_of_workers();

}  // namespace spectral_kernels::cpu
