// Jobs over the threads that torch gives us. Torch-free interface; parallel.cpp stands on
// torch_parallel, so torch.set_num_threads is obeyed and nested calls run serially.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace spectral_kernels::cpu {

// Whether this is a child of a process that had used threads here: the child has their bookkeeping
// but not the threads, and would wait for them for ever. Everything runs serially then.
bool forked_from_threads();
void mark_threads_used();

// Threads that a parallel section started here would get; 1 inside another one.
int available_threads();

// Calls job(i) for i in [0, jobs), each exactly once, on up to `threads` threads. Jobs are handed
// out in order as threads become free, so put the longest first. A job must not depend on the
// thread or on another job. An exception is rethrown in the calling thread.
void parallel_jobs(int64_t jobs, int threads, const std::function<void(int64_t)>& job);

// Calls body(i, threads) for every matrix i of a list or batch. A matrix that would keep the others
// waiting gets all threads, one after another; the rest run side by side with one thread each, the
// largest first. `work` estimates the multiply-adds of each. `bytes`, if given, is the scratch
// memory of each: it is set aside for every thread before the first call, so that none fails for
// want of it.
void parallel_matrices(const std::vector<double>& work,
                       const std::function<void(int64_t, int)>& body,
                       const std::vector<size_t>& bytes = {});

}  // namespace spectral_kernels::cpu
