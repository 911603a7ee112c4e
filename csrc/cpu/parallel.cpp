#include "parallel.h"

#include <omp.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <utility>

#include "../tensor.h"
#include "workspace.h"

#ifndef _OPENMP
#error "compile with -fopenmp: without it nested sections are not seen"
#endif

namespace spectral_kernels::cpu {

namespace {

std::atomic<bool> used_threads{false};
std::atomic<bool> forked{false};
thread_local bool inside = false;  // a job of ours, where torch's threads are not OpenMP's

#if defined(__unix__) || defined(__APPLE__)
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = used_threads.load(); });
#endif

}  // namespace

bool forked_from_threads() { return forked.load(std::memory_order_relaxed); }

void mark_threads_used() { used_threads.store(true, std::memory_order_relaxed); }

int available_threads() {
  return forked_from_threads() || inside || omp_in_parallel() ? 1 : torch_threads();
}

namespace {

int64_t workers_for(int64_t jobs, int threads) {
  return std::min<int64_t>({jobs, threads, available_threads()});
}

// parallel_jobs, with a number below workers_for() that tells the threads apart.
template <class F>
void numbered_jobs(int64_t jobs, int threads, const F& job) {
  const int64_t workers = workers_for(jobs, threads);
  if (workers <= 1) {
    for (int64_t i = 0; i < jobs; i++) job(i, int64_t(0));
    return;
  }
  mark_threads_used();
  std::atomic<int64_t> next{0};
  struct Inside {
    const bool before = std::exchange(inside, true);
    ~Inside() { inside = before; }
  };
  torch_parallel(workers, [&](int64_t worker) {
    const Inside here;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) job(i, worker);
  });
}

}  // namespace

void parallel_jobs(int64_t jobs, int threads, const std::function<void(int64_t)>& job) {
  numbered_jobs(jobs, threads, [&](int64_t i, int64_t) { job(i); });
}

namespace {

// What every worker needs at most: the first one also takes the leading `wide` matrices.
std::vector<std::unique_ptr<Reserve>> reserves(const std::vector<int64_t>& order, size_t wide,
                                               int64_t workers, const std::vector<size_t>& bytes) {
  std::vector<std::unique_ptr<Reserve>> list;
  if (bytes.empty()) return list;
  size_t most = 0, most_of_all = 0;
  for (size_t k = 0; k < order.size(); k++) {
    const size_t size = bytes[size_t(order[k])];
    most_of_all = std::max(most_of_all, size);
    if (k >= wide) most = std::max(most, size);
  }
  list.push_back(std::make_unique<Reserve>(most_of_all));
  for (int64_t w = 1; w < workers; w++) list.push_back(std::make_unique<Reserve>(most));
  return list;
}

// A matrix alone on all threads runs at this share of perfect scaling (measured on two cores: 0.91
// to 0.95 for 512 and up); below the grain it gains nothing from a second thread.
constexpr double kWideEfficiency = 0.92;
constexpr double kWideGrain = 1 << 22;

// From here on (a square of 2048) matrices side by side take each other's cache and twice the
// workspace: the refresh of two bases of 3072 took 3.4 s so, and 2.0 s one after the other.
constexpr double kAlone = 0x1p33;
constexpr double kAloneEfficiency = 1.05;

// Time until the last of `work` (sorted, largest first) is done if each takes the first free
// thread.
double side_by_side(const std::vector<double>& work, size_t first, int threads) {
  std::vector<double> busy(size_t(threads), 0.0);
  for (size_t i = first; i < work.size(); i++)
    *std::min_element(busy.begin(), busy.end()) += work[i];
  return *std::max_element(busy.begin(), busy.end());
}

}  // namespace

void parallel_matrices(const std::vector<double>& work,
                       const std::function<void(int64_t, int)>& body,
                       const std::vector<size_t>& bytes) {
  const int threads = available_threads();
  std::vector<int64_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  const auto run_list = [&](size_t wide) {
    const int64_t rest = int64_t(order.size() - wide);
    const auto set_aside = reserves(order, wide, workers_for(rest, threads), bytes);
    const auto call = [&](int64_t i, int given, int64_t worker) {
      if (set_aside.empty()) return body(i, given);
      const Reserve::Use use(*set_aside[size_t(worker)]);
      body(i, given);
    };
    for (size_t i = 0; i < wide; i++) call(order[i], threads, 0);
    numbered_jobs(rest, threads,
                  [&](int64_t i, int64_t worker) { call(order[wide + size_t(i)], 1, worker); });
  };
  if (threads <= 1) return run_list(0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return work[size_t(a)] > work[size_t(b)]; });
  std::vector<double> sorted;
  for (int64_t i : order) sorted.push_back(work[size_t(i)]);
  // The number of leading matrices that get all threads, by the shortest estimated time.
  size_t wide = 0;
  double wide_time = 0, best = side_by_side(sorted, 0, threads);
  const size_t candidates = std::min(sorted.size(), size_t(4 * threads));
  for (size_t k = 1; k <= candidates && sorted[k - 1] >= kWideGrain; k++) {
    const double efficiency = sorted[k - 1] < kAlone ? kWideEfficiency : kAloneEfficiency;
    wide_time += sorted[k - 1] / (threads * efficiency);
    const double time = wide_time + side_by_side(sorted, k, threads);
    if (time < best) {
      best = time;
      wide = k;
    }
  }
  run_list(wide);
}

}  // namespace spectral_kernels::cpu
