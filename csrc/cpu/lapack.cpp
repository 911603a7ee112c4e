#include "lapack.h"

#include <ATen/Parallel.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/where.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "parallel.h"

// MKL's own switch, where torch was built with MKL and lets its symbols out.
#if defined(__linux__)
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
#endif

namespace spectral_kernels::cpu {
namespace {

// Once torch.set_num_threads has been called, MKL splits its work for that many threads even inside
// a parallel region, where it gets only one; so it is told as well.
class OneMklThread {
 public:
#if defined(__linux__)
  OneMklThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
#else
  OneMklThread() : before_(0) {}
#endif
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_;
};

at::Tensor view(double* data, int64_t rows, int64_t cols) {
  return at::from_blob(data, {rows, cols}, at::kDouble);
}

// LAPACK reports a failure by an exception of torch's.
template <class F>
bool converged(const F& f) {
  const c10::InferenceMode no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  try {
    f();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

}  // namespace

void lapack_jobs(int64_t jobs, const std::function<void(int64_t)>& job) {
  if (jobs == 0) return;
  if (forked_from_threads()) {
    const int threads = at::get_num_threads();
    const OneMklThread one;
    at::set_num_threads(1);
    for (int64_t i = 0; i < jobs; i++) job(i);
    at::set_num_threads(threads);
    return;
  }
  mark_threads_used();
  const int threads = std::max(2, at::get_num_threads());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < jobs; i++) {
    const OneMklThread one;
    job(i);
  }
}

bool eigh(int64_t n, double* a, double* values, double* vectors) {
  return converged([&] {
    const auto [w, v] = at::linalg_eigh(view(a, n, n));
    at::from_blob(values, {n}, at::kDouble).copy_(w);
    view(vectors, n, n).copy_(v);
  });
}

bool householder_q(int64_t n, double* a, double* q) {
  return converged([&] {
    const auto [orthogonal, r] = at::linalg_qr(view(a, n, n));
    const at::Tensor sign = at::where(r.diagonal().lt(0), -1.0, 1.0);
    view(q, n, n).copy_(orthogonal.mul(sign));
  });
}

bool svd_polar(int64_t m, int64_t n, const double* a, double threshold, double* out) {
  return converged([&] {
    const auto [u, s, vh] =
        at::linalg_svd(view(const_cast<double*>(a), m, n), /*full_matrices=*/false);
    const at::Tensor kept = s.gt(s.max().mul(threshold)).to(at::kDouble);
    view(out, m, n).copy_(u.mul(kept).matmul(vh));
  });
}

}  // namespace spectral_kernels::cpu
