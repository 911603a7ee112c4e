#include "lapack.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>

#include "../boxing.h"
#include "../counters.h"
#include "lapack_checks.h"
#include "parallel.h"
#include "views.h"

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
std::atomic<bool> has_mkl{true};

bool has_switch() { return MKL_Set_Num_Threads_Local != nullptr && !hidden.load(); }

// Once torch.set_num_threads has been called, MKL splits its work for that many threads even inside
// a parallel region, where it gets only one; the rest is then not done, and no error says so. So
// MKL is told as well. Torch tells every thread its number once, when that thread first asks for
// it, deep inside a factorization if not before: it has to have asked.
class OneMklThread {
 public:
  OneMklThread() {
    torch_threads();
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
  const int threads = torch_threads();
  set_torch_threads(1);
  f();
  set_torch_threads(threads);
}

Tensor tensor_of(const double* data, int64_t rows, int64_t cols) {
  return from_blob(const_cast<double*>(data), {rows, cols}, kDouble);
}

Matrix matrix_of(double* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1, DType::kF64};
}

// One result of torch's, densely row by row.
std::vector<double> dense(const Tensor& t) {
  const int64_t rows = t.dim() == 1 ? 1 : t.size(0), cols = t.size(-1);
  std::vector<double> elements(size_t(rows * cols));
  const Matrix from{t.data_ptr(), rows,       cols, t.dim() == 1 ? 0 : t.stride(0),
                    t.stride(-1), DType::kF64};
  copy_scaled(from, 0, matrix_of(elements.data(), rows, cols));
  return elements;
}

// LAPACK reports a failure by an exception of torch's. Autocast leaves fp64 alone.
template <class F>
bool converged(const F& f) {
  try {
    return f();
  } catch (const TorchError&) {
    return false;
  }
}

// Calls f(i) for i in [0, jobs), one matrix a thread, in an active region of two threads at least.
template <class F>
void in_region(int64_t jobs, const F& f) {
  const int threads = std::max(2, torch_threads());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < jobs; i++) {
    const OneMklThread one;
    f(i);
  }
}

}  // namespace

const char* mkl_thread_limit() {
  if (!has_mkl.load()) return "none";
  return has_switch() ? "switch" : "calling thread";
}

void lapack_jobs(const char* routine, int64_t jobs, const std::function<bool(int64_t)>& job) {
  if (jobs == 0) return;
  std::vector<char> done(size_t(jobs), 0);
  const auto first = [&](int64_t i) { done[size_t(i)] = job(i); };
  const auto all_here = [&] {
    for (int64_t i = 0; i < jobs; i++) first(i);
  };
  const bool unprotected = has_mkl.load() && !has_switch();  // no worker can be held to one thread
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
    const auto [w, v] =
        called_for<Tensor, Tensor>("aten::linalg_eigh", "", tensor_of(a, n, n), std::string("L"));
    std::vector<double> columns = dense(v);
    corrupt_columns(columns.data(), n, n);
    const std::vector<double> ascending = dense(w);
    std::copy(ascending.begin(), ascending.end(), values);
    copy_scaled(matrix_of(columns.data(), n, n), 0, matrix_of(vectors, n, n).transposed());
    return is_eigendecomposition(n, a, values, vectors);
  });
}

bool svd_polar(int64_t m, int64_t n, const double* a, double threshold, double* out) {
  return converged([&] {
    const int64_t s = std::min(m, n);
    const auto [left_vectors, singular, right_vectors] = called_for<Tensor, Tensor, Tensor>(
        "aten::linalg_svd", "", tensor_of(a, m, n), /*full_matrices=*/false, None{});
    std::vector<double> left = dense(left_vectors), right = dense(right_vectors);
    const std::vector<double> values = dense(singular);
    corrupt_columns(left.data(), m, s);
    const double most = *std::max_element(values.begin(), values.end());
    std::vector<double> kept, scaled(left);
    for (double value : values) kept.push_back(value > most * threshold ? 1 : 0);
    for (size_t i = 0; i < scaled.size(); i++) scaled[i] *= kept[i % size_t(s)];
    const Tensor product = called<Tensor>("aten::matmul", "", tensor_of(scaled.data(), m, s),
                                          tensor_of(right.data(), s, n));
    const std::vector<double> polar = dense(product);
    std::copy(polar.begin(), polar.end(), out);
    const Svd svd{m, n, left.data(), values.data(), right.data()};
    return is_svd(a, svd) && is_polar(out, svd, kept.data());
  });
}

void set_has_mkl(bool has) { has_mkl.store(has); }

void corrupt_columns(double* matrix, int64_t rows, int64_t columns) {
  int64_t left = to_corrupt.load();
  while (left > 0 && !to_corrupt.compare_exchange_weak(left, left - 1)) {
  }
  if (left <= 0) return;
  for (int64_t i = 0; i < rows; i++) std::reverse(matrix + i * columns, matrix + (i + 1) * columns);
}

void corrupt_lapack(int64_t results) { to_corrupt.store(results); }

void hide_mkl_switch(bool on) { hidden.store(on); }

std::vector<int> mkl_threads_of_workers() {
  std::vector<int> found;
  std::mutex mutex;
  std::condition_variable all_here;
  const int64_t workers = std::max(2, torch_threads());
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
