#include "parallel.h"

#include <ATen/Parallel.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <numeric>

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for is serial and does not say so"
#endif

namespace spectral_kernels::cpu {

namespace {

std::atomic<bool> used_threads{false};
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = used_threads.load(); });
#endif

}  // namespace

bool forked_from_threads() { return forked.load(std::memory_order_relaxed); }

void mark_threads_used() { used_threads.store(true, std::memory_order_relaxed); }

int available_threads() {
  return forked_from_threads() || at::in_parallel_region() ? 1 : at::get_num_threads();
}

void parallel_jobs(int64_t jobs, int threads, const std::function<void(int64_t)>& job) {
  const int64_t workers = std::min<int64_t>({jobs, threads, available_threads()});
  if (workers <= 1) {
    for (int64_t i = 0; i < jobs; i++) job(i);
    return;
  }
  mark_threads_used();
  std::atomic<int64_t> next{0};
  constexpr int64_t kOneWorkerEach = 1;
  at::parallel_for(0, workers, kOneWorkerEach, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) job(i);
  });
}

namespace {

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
                       const std::function<void(int64_t, int)>& body) {
  const int threads = available_threads();
  std::vector<int64_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  if (threads <= 1) {
    for (int64_t i : order) body(i, 1);
    return;
  }
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
  for (size_t i = 0; i < wide; i++) body(order[i], threads);
  parallel_jobs(int64_t(order.size() - wide), threads,
                [&](int64_t i) { body(order[wide + size_t(i)], 1); });
}

}  // namespace spectral_kernels::cpu
