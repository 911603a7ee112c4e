#include "lapack.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>

#include "../counters.h"
#include "lapack_checks.h"
#include "parallel.h"

// MKL's own switch, where torch was built with MKL and lets its symbols out.
#if defined(__linux__)
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
extern "C" int MKL_Get_Max_Threads() __attribute__((weak));
#else
constexpr int (*MKL_Set_Num_Threads_Local)(int) = nullptr;
constexpr int (*MKL_Get_Max_Threads)() = nullptr;
#endif

namespace spectral_kernels::cpu {
namespace {

std::atomic<int64_t> to_corrupt{0};
std::atomic<bool> hidden{false};

bool has_switch() { return MKL_Set_Num_Threads_Local != nullptr && !hidden.load(); }

// Once torch.set_num_threads has been called, MKL splits its work for that many threads even inside
// a parallel region, where it gets only one; the rest is then not done, and no error says so. So
// MKL is told as well. Torch tells every thread its number once, when that thread first asks for
// it, deep inside a factorization if not before: it has to have asked.
class OneMklThread {
 public:
  OneMklThread() {
    at::get_num_threads();
    if (has_switch()) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneMklThread() {
    if (before_ >= 0) MKL_Set_Num_Threads_Local(before_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_ = -1;
};

// Runs f outside any region of ours, where torch, and MKL through it, keep to this thread. The
// number is the process's for threads that ask for the first time meanwhile, so it is changed by
// one caller at a time; a forked child may find the lock taken by a thread that it does not have.
template <class F>
void on_this_thread_alone(const F& f) {
  static std::mutex one_caller;
  std::unique_lock<std::mutex> lock(one_caller, std::defer_lock);
  if (!forked_from_threads()) lock.lock();
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  f();
  at::set_num_threads(threads);
}

at::Tensor view(const double* data, int64_t rows, int64_t cols) {
  return at::from_blob(const_cast<double*>(data), {rows, cols}, at::kDouble);
}

// LAPACK reports a failure by an exception of torch's.
template <class F>
bool converged(const F& f) {
  const c10::InferenceMode no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  try {
    return f();
  } catch (const c10::Error&) {
    return false;
  }
}

// What a test asks for: the first and the last column change places, which no test of orthogonality
// sees.
void corrupt(const at::Tensor& columns) {
  int64_t left = to_corrupt.load();
  while (left > 0 && !to_corrupt.compare_exchange_weak(left, left - 1)) {
  }
  if (left > 0) columns.copy_(columns.flip(1));
}

// Calls f(i) for i in [0, jobs), one matrix a thread, in an active region of two threads at least.
template <class F>
void in_region(int64_t jobs, const F& f) {
  const int threads = std::max(2, at::get_num_threads());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < jobs; i++) {
    const OneMklThread one;
    f(i);
  }
}

}  // namespace

const char* mkl_thread_limit() {
  if (!at::hasMKL()) return "none";
  return has_switch() ? "switch" : "calling thread";
}

void lapack_jobs(const char* routine, int64_t jobs, const std::function<bool(int64_t)>& job) {
  if (jobs == 0) return;
  std::vector<char> done(size_t(jobs), 0);
  const auto first = [&](int64_t i) { done[size_t(i)] = job(i); };
  const auto all_here = [&] {
    for (int64_t i = 0; i < jobs; i++) first(i);
  };
  const bool unprotected = at::hasMKL() && !has_switch();  // no worker can be held to one thread
  if (forked_from_threads() || unprotected) {
    on_this_thread_alone(all_here);
  } else {
    mark_threads_used();
    in_region(jobs, first);
  }
  for (int64_t i = 0; i < jobs; i++) {
    if (done[size_t(i)]) continue;
    count_fault(routine);
    bool repeated = false;
    on_this_thread_alone([&] { repeated = job(i); });
    if (!repeated) count_fault(std::string(routine) + "/again");
  }
}

bool eigh(int64_t n, const double* a, double* values, double* vectors) {
  return converged([&] {
    const auto [w, v] = at::linalg_eigh(view(a, n, n));
    corrupt(v);
    at::from_blob(values, {n}, at::kDouble).copy_(w);
    view(vectors, n, n).copy_(v.mT());  // as LAPACK has it: nothing is transposed
    return is_eigendecomposition(n, a, values, vectors);
  });
}

bool svd_polar(int64_t m, int64_t n, const double* a, double threshold, double* out) {
  return converged([&] {
    const auto [u, s, vh] = at::linalg_svd(view(a, m, n), /*full_matrices=*/false);
    corrupt(u);
    const at::Tensor kept = s.gt(s.max().mul(threshold)).to(at::kDouble);
    view(out, m, n).copy_(u.mul(kept).matmul(vh));
    const at::Tensor left = u.contiguous(), right = vh.contiguous(), values = s.contiguous();
    const Svd svd{m, n, left.const_data_ptr<double>(), values.const_data_ptr<double>(),
                  right.const_data_ptr<double>()};
    return is_svd(a, svd) && is_polar(out, svd, kept.const_data_ptr<double>());
  });
}

void corrupt_lapack(int64_t results) { to_corrupt.store(results); }

void hide_mkl_switch(bool on) { hidden.store(on); }

std::vector<int> mkl_threads_of_workers() {
  std::vector<int> found;
  std::mutex mutex;
  std::condition_variable all_here;
  const int64_t workers = std::max(2, at::get_num_threads());
  lapack_jobs("none", workers, [&](int64_t) {
    const double a[] = {2, 1, 1, 2};
    double values[2], vectors[4];
    eigh(2, a, values, vectors);  // whatever torch does when a thread first comes here
    std::unique_lock<std::mutex> lock(mutex);
    found.push_back(MKL_Get_Max_Threads ? MKL_Get_Max_Threads() : -1);
    all_here.notify_all();
    all_here.wait_for(lock, std::chrono::seconds(10),
                      [&] { return int64_t(found.size()) == workers; });
    return true;
  });
  return int64_t(found.size()) == workers ? found : std::vector<int>{};
}

}  // namespace spectral_kernels::cpu
