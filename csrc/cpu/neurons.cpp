#include "neurons.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "product.h"

namespace spectral_kernels::cpu {
namespace {

constexpr int64_t kRows = 16;  // of a job, so that columns of a transposed parameter are lines
constexpr int kPart = 64;      // of a line, converted at a time

// The fp64 sum of squares of a line, in a fixed order.
template <class T>
double squares(const T* x, int64_t n) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) sums[l] += double(x[j + l]) * double(x[j + l]);
  for (; j < n; j++) sums[j % kLanes] += double(x[j]) * double(x[j]);
  double sum = 0;
  for (const double each : sums) sum += each;
  return sum;
}

// keep W - rate O of one element. Signs are compared, and keep chosen, as bits: comparisons of
// floating-point numbers may trap, and loops with them stay scalar. For W = 0 nothing depends on
// the outcome.
template <bool kCautious, class T>
inline T moved(T w, T o, T rate, T kept) {
  if (kCautious) {
    using Bits = std::conditional_t<sizeof(T) == sizeof(int32_t), int32_t, int64_t>;
    constexpr int kSign = 8 * sizeof(T) - 1;
    const Bits u = std::bit_cast<Bits>(o), size = u & std::numeric_limits<Bits>::max();
    // All ones where O is not 0 and its sign is not W's.
    const Bits against = ((u ^ std::bit_cast<Bits>(w)) & -size) >> kSign;
    kept = std::bit_cast<T>(
        Bits((std::bit_cast<Bits>(T(1)) & against) | (std::bit_cast<Bits>(kept) & ~against)));
  }
  return kept * w - rate * o;
}

// `count` elements of a line of W, each rounded once.
template <bool kCautious, class T, class W>
inline void move_part(W* __restrict line, const T* __restrict o, int64_t count, T rate, T kept) {
  T part[kPart];
  for (int64_t j = 0; j < count; j++) part[j] = T(line[j]);
  for (int64_t j = 0; j < count; j++) part[j] = moved<kCautious>(part[j], o[j], rate, kept);
  for (int64_t j = 0; j < count; j++) line[j] = W(part[j]);
}

template <bool kCautious, class T, class W>
void move_line(W* line, const T* o, int64_t n, T rate, T kept) {
  int64_t j = 0;
  for (; j + kPart <= n; j += kPart)
    move_part<kCautious>(line + j, o + j, int64_t(kPart), rate, kept);
  move_part<kCautious>(line + j, o + j, n - j, rate, kept);
}

// Rows [r0, r1).
template <bool kCautious, class T, class W>
void update_as(const NeuronStep& p, int64_t r0, int64_t r1) {
  const int64_t n = p.o.cols;
  const T kept = T(1 - p.decay);
  T rates[kRows];
  for (int64_t i = r0; i < r1; i++) rates[i - r0] = T(p.rate * (p.second ? p.factors[i] : 1));
  const T* const o = static_cast<const T*>(p.o.data);
  W* const w = static_cast<W*>(p.param.data);
  if (p.param.col_stride == 1) {
    for (int64_t i = r0; i < r1; i++)
      move_line<kCautious>(w + i * p.param.row_stride, o + i * n, n, rates[i - r0], kept);
    return;
  }
  for (int64_t j = 0; j < n; j++) {
    W* const column = w + j * p.param.col_stride;
    for (int64_t i = r0; i < r1; i++) {
      W& each = column[i * p.param.row_stride];
      each = W(moved<kCautious>(T(each), o[i * n + j], rates[i - r0], kept));
    }
  }
}

template <class T, class W>
void update(const NeuronStep& p, int64_t r0, int64_t r1) {
  if (p.cautious)
    update_as<true, T, W>(p, r0, r1);
  else
    update_as<false, T, W>(p, r0, r1);
}

template <class T>
void update(const NeuronStep& p, int64_t r0, int64_t r1) {
  switch (p.param.dtype) {
    case DType::kF32:
      return update<T, float>(p, r0, r1);
    case DType::kF64:
      return update<T, double>(p, r0, r1);
    case DType::kBF16:
      return update<T, c10::BFloat16>(p, r0, r1);
    case DType::kF16:
      return update<T, c10::Half>(p, r0, r1);
  }
}

// The second moments, and the factor of every row.
template <class T>
void average(const NeuronStep& p) {
  T* const v = static_cast<T*>(p.second.data);
  double before = 0, after = 0;
  for (int64_t i = 0; i < p.o.rows; i++) {
    T& each = v[i * p.second.row_stride];
    each = T(p.beta2 * double(each) + (1 - p.beta2) * (p.sums[i] / double(p.o.cols)));
    p.factors[i] = 1 / (std::sqrt(double(each)) + p.eps);
    before += p.sums[i];
    after += p.factors[i] * p.factors[i] * p.sums[i];
  }
  // Without a direction there is no length to keep.
  const double same = after == 0 ? 0 : std::sqrt(before / after);
  for (int64_t i = 0; i < p.o.rows; i++) p.factors[i] *= same;
}

template <class T>
void run_as(const NeuronStep& p, int threads) {
  const int64_t m = p.o.rows, jobs = ceil_div(m, kRows);
  const auto by_rows = [&](const auto& body) {
    parallel_jobs(jobs, threads,
                  [&](int64_t job) { body(job * kRows, std::min(m, (job + 1) * kRows)); });
  };
  if (p.second) {
    by_rows([&](int64_t r0, int64_t r1) {
      for (int64_t i = r0; i < r1; i++)
        p.sums[i] = squares(static_cast<const T*>(p.o.data) + i * p.o.cols, p.o.cols);
    });
    average<T>(p);
  }
  by_rows([&](int64_t r0, int64_t r1) { update<T>(p, r0, r1); });
}

size_t o_bytes(int64_t m, int64_t n, bool fp64) {
  return Workspace::rounded(size_t(m * n) * (fp64 ? sizeof(double) : sizeof(float)));
}

}  // namespace

size_t neuron_bytes(int64_t m, int64_t n, bool fp64) {
  return o_bytes(m, n, fp64) + 2 * Workspace::rounded(size_t(m) * sizeof(double));
}

Matrix take_neurons(Workspace& workspace, NeuronStep& step, bool fp64) {
  const int64_t m = step.param.rows, n = step.param.cols;
  step.o = {workspace.take(o_bytes(m, n, fp64)), m, n, n, 1, fp64 ? DType::kF64 : DType::kF32};
  for (double** rows : {&step.sums, &step.factors})
    *rows = static_cast<double*>(workspace.take(size_t(m) * sizeof(double)));
  return step.o;
}

void run(const NeuronStep& step, int threads) {
  if (double(step.o.rows) * double(step.o.cols) < kThreadGrain / 16) threads = 1;
  if (step.o.dtype == DType::kF64)
    run_as<double>(step, threads);
  else
    run_as<float>(step, threads);
}

}  // namespace spectral_kernels::cpu
