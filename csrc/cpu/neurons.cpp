#include "neurons.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "product.h"
#include "with_type.h"

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

// The fp64 sums of W_ij², W_ij O_ij and O_ij² over a row, in a fixed order. kDense: W's elements
// are neighbours, and the loop is one of vectors.
template <bool kDense, class T, class W>
void products(const W* w, int64_t stride, const T* o, int64_t n, double& length, double& dot,
              double& square) {
  constexpr int kLanes = 8;
  double lengths[kLanes] = {}, dots[kLanes] = {}, squares[kLanes] = {};
  const auto add = [&](int64_t j, int l) {
    const double x = double(T(w[kDense ? j : j * stride])), y = double(o[j]);
    lengths[l] += x * x;
    dots[l] += x * y;
    squares[l] += y * y;
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) add(j + l, l);
  for (; j < n; j++) add(j, int(j % kLanes));
  length = dot = square = 0;
  for (int l = 0; l < kLanes; l++) {
    length += lengths[l];
    dot += dots[l];
    square += squares[l];
  }
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
  const T kept = T(p.hyperball ? p.kept : 1 - p.decay);
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
void measure(const NeuronStep& p, int64_t r0, int64_t r1) {
  const T* const o = static_cast<const T*>(p.o.data);
  const int64_t n = p.o.cols;
  if (!p.hyperball) {
    for (int64_t i = r0; i < r1; i++) p.sums[i] = squares(o + i * n, n);
    return;
  }
  with_type(p.param.dtype, [&](auto type) {
    const auto* const w = static_cast<const decltype(type)*>(p.param.data);
    const int64_t stride = p.param.col_stride;
    const auto row =
        stride == 1 ? products<true, T, decltype(type)> : products<false, T, decltype(type)>;
    for (int64_t i = r0; i < r1; i++)
      row(w + i * p.param.row_stride, stride, o + i * n, n, p.lengths[i], p.dots[i], p.sums[i]);
  });
}

// What W and U are multiplied by, `kept` and `rate`, so that W keeps its length.
void project(NeuronStep& p) {
  double o = 0, w = 0, dot = 0;
  for (int64_t i = 0; i < p.o.rows; i++) {
    const double f = p.second ? p.factors[i] : 1;
    o += f * f * p.sums[i];
    w += p.lengths[i];
    dot += f * p.dots[i];
  }
  const double rate = o == 0 ? 0 : p.rate * std::sqrt(w / o);
  // Of W' over W; what is left where they cancel is no direction.
  const double squared = w == 0 || rate == 0 ? 1 : (w - 2 * rate * dot + rate * rate * o) / w;
  p.kept = 1 / std::sqrt(std::max(squared, 0.0));
  p.rate = rate * p.kept;
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
void run_as(NeuronStep& p, int threads) {
  const int64_t m = p.o.rows, jobs = ceil_div(m, kRows);
  const auto by_rows = [&](const auto& body) {
    parallel_jobs(jobs, threads,
                  [&](int64_t job) { body(job * kRows, std::min(m, (job + 1) * kRows)); });
  };
  if (p.second || p.hyperball) by_rows([&](int64_t r0, int64_t r1) { measure<T>(p, r0, r1); });
  if (p.second) average<T>(p);
  if (p.hyperball) project(p);
  by_rows([&](int64_t r0, int64_t r1) {
    with_type(p.param.dtype, [&](auto type) { update<T, decltype(type)>(p, r0, r1); });
  });
}

size_t o_bytes(int64_t m, int64_t n, bool fp64) {
  return Workspace::rounded(size_t(m * n) * (fp64 ? sizeof(double) : sizeof(float)));
}

}  // namespace

size_t neuron_bytes(int64_t m, int64_t n, bool fp64) {
  return o_bytes(m, n, fp64) + 4 * Workspace::rounded(size_t(m) * sizeof(double));
}

Matrix take_neurons(Workspace& workspace, NeuronStep& step, bool fp64) {
  const int64_t m = step.param.rows, n = step.param.cols;
  step.o = {workspace.take(o_bytes(m, n, fp64)), m, n, n, 1, fp64 ? DType::kF64 : DType::kF32};
  for (double** rows : {&step.sums, &step.factors, &step.lengths, &step.dots})
    *rows = static_cast<double*>(workspace.take(size_t(m) * sizeof(double)));
  return step.o;
}

void run(NeuronStep step, int threads) {
  if (double(step.o.rows) * double(step.o.cols) < kThreadGrain / 16) threads = 1;
  if (step.o.dtype == DType::kF64)
    run_as<double>(step, threads);
  else
    run_as<float>(step, threads);
}

}  // namespace spectral_kernels::cpu
