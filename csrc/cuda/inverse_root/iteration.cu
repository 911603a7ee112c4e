// Coupled iteration X <- N X, M <- N^p M with N = a + b M + c M², all on chip; the residual of the
// root, and a second attempt from a lower bound, too. reference/inverse_root.py specifies it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../../root_rows.h"
#include "../base/kernel_table.h"
#include "../base/launch.h"
#include "../symmetric_matmul/on_chip_matrix.h"
#include "iteration.h"

namespace spectral_kernels::cuda {
namespace {

constexpr float kUnitRoundoff = 0x1p-24f;
constexpr float kMScale = 0x1p14f;  // |M| <= 1
constexpr int kProbes = 8;
constexpr float kResidualLimit = 0.25f;
constexpr float kWeightedLimit = 256;  // units of roundoff, see the specification

// The larger one, NaN if either is.
DEVICE float larger(float a, float b) { return b <= a || a != a ? a : b; }

template <int kNB>
struct Layout {
  static constexpr int kRows = 16 * kNB;
  static constexpr int kVectors = 3 * OnChip<kNB>::kMatrix;
  static constexpr int kScratch = kVectors + 2 * kRows * kProbes * int(sizeof(float));
  static constexpr int kBytes = kScratch + kNB * int(sizeof(double)) + 16;
};

// Element (i, j) of the matrix at byte m.
template <int kNB>
DEVICE float element(const char* m, int i, int j) {
  using Chip = OnChip<kNB>;
  int d = (j / 16 - i / 16 + kNB) % kNB;
  if (d >= Chip::kTiles) {
    const int other = i;
    i = j;
    j = other;
    d = kNB - d;
  }
  const int row = i % 16, column = j % 16, core = row / 8 + column / 8 * 2;
  const char* p =
      m + (i / 16 * Chip::kTiles + d) * 1024 + core * 128 + row % 8 * 16 + column % 8 / 2 * 4;
  const float2 high = unpack_f16(*reinterpret_cast<const uint32_t*>(p));
  const float2 low = unpack_f16(*reinterpret_cast<const uint32_t*>(p + 512));
  return column % 2 == 0 ? high.x + low.x : high.y + low.y;
}

template <int kNB>
__global__ void __launch_bounds__(kNB * 32, 1)
    root_kernel(const __grid_constant__ Table table,
                const __grid_constant__ RootSchedules schedules, const RootCall call,
                const uint32_t* largest, const RootResults results) {
  using Chip = OnChip<kNB>;
  using Memory = Layout<kNB>;
  DYNAMIC_SHARED(char, shared);
  constexpr int kM = 0, kN = Chip::kMatrix, kX = 2 * Chip::kMatrix;
  float* vectors = reinterpret_cast<float*>(shared + Memory::kVectors);
  double* scratch = reinterpret_cast<double*>(shared + Memory::kScratch);
  const Chip chip(shared);
  const Place at = place(table, blockIdx.x, [](const Entry&) { return int64_t(1); });
  const Entry& e = *at.entry;
  const int n = e.rows, p = schedules.p, tid = threadIdx.x;
  const int64_t matrix = e.first + at.matrix;
  const uint32_t bits = largest[matrix];

  const auto finish = [&](int64_t status, int64_t steps, float residual, float delta) {
    if (tid != 0) return;
    results.status[matrix] = status;
    results.steps[matrix] = steps;
    results.residual[matrix] = residual;
    results.delta[matrix] = delta;
  };
  const auto fill = [&](float value) {
    for (int i = tid; i < n * n; i += Chip::kThreads)
      write(e.target, at.matrix * e.target.batch + i / n * e.target.row + i % n * e.target.column,
            value);
  };
  if (!finite(bits)) {
    const float nan = float_of(0x7fc00000u);
    fill(nan);
    return finish(kRootNonFinite, 0, nan, nan);
  }
  const uint32_t ridge_bits = bits_of(call.ridge), most = ridge_bits > bits ? ridge_bits : bits;
  if (most == 0) {
    fill(0);
    return finish(kRootRankDeficient, 0, 0, 0);
  }
  // A power of 2^p, so that the root is scaled exactly.
  const int exponent = exponent_of(most);
  const int shift = p * ((exponent - (exponent < 0 ? p - 1 : 0)) / p);
  const PowerOfTwo scaled(-shift);
  const auto symmetric = [&](int i, int j) {
    if (i >= n || j >= n) return 0.f;
    const int64_t from = at.matrix * e.source.batch;
    const float a = read(e.source, from + i * e.source.row + j * e.source.column);
    const float b = read(e.source, from + j * e.source.row + i * e.source.column);
    return .5f * (scaled(a) + scaled(b));
  };

  // delta, from the largest absolute row sum
  float sum = 0;
  if (tid < n)
    for (int j = 0; j < n; j++) sum += fabsf(symmetric(tid, j));
  for (int mask = 16; mask; mask >>= 1) sum = larger(sum, __shfl_xor_sync(~0u, sum, mask));
  if (tid % 32 == 0) vectors[tid / 32] = sum;
  __syncthreads();
  for (int w = 0; w < kNB; w++) sum = larger(sum, vectors[w]);
  const float delta = larger(scaled(call.ridge), call.relative_ridge * sum);
  const float shown = PowerOfTwo(shift)(delta);

  // nu >= the largest eigenvalue of B = A + delta I
  typename Chip::Accumulator acc;
  const auto load = [&](float factor) {  // B times factor; beyond n an identity, if anything
    Chip::each(acc, [&](int d, int h, int low, float& u, float& v) {
      const int i = chip.row(low), j = chip.column(d, h);
      u = symmetric(i, j);
      v = symmetric(i, j + 1);
      if (i == j && i < n) u += delta;
      if (i == j + 1 && i < n) v += delta;
      u *= factor;
      v *= factor;
    });
  };
  load(1);
  const float frobenius = float(sqrt(chip.sum_of_squares(acc, scratch)));
  Chip::scale(acc, 1 / frobenius);
  chip.store(acc, shared + kM, kMScale);
  __syncthreads();
  Chip::zero(acc);
  chip.product(acc, kM, kM);
  Chip::scale(acc, 1 / (kMScale * kMScale));
  const float nu =
      frobenius * float(sqrt(sqrt(chip.sum_of_squares(acc, scratch)))) * (1 + 4 * kUnitRoundoff);
  const bool bounded = delta >= 4 * kUnitRoundoff * nu;
  if (call.never || (!bounded && !call.always)) return finish(kRootUnbounded, 0, 0, shown);
  const float end = bounded ? delta / nu : 4 * kUnitRoundoff;
  const float weighted_limit =
      kWeightedLimit * kUnitRoundoff * (p + float(pow(double(end), -1.0 / p)));
  const int level_of_low = -exponent_of(bits_of(end));
  const int lowest = level_of_low > 1 ? level_of_low : 1;  // one step at least

  // Where the ridge's own schedule fails, a longer one is tried.
  int level = lowest;
  for (int attempt = 0; attempt < 2; attempt++) {
    const int steps = schedules.steps[level];
    load(1 / nu);
    Chip::each(acc, [&](int d, int h, int low, float& u, float& v) {  // 1 stays 1 beyond n
      if (chip.row(low) >= n && chip.diagonal(d, h, low, 0)) u = 1;
      if (chip.row(low) >= n && chip.diagonal(d, h, low, 1)) v = 1;
    });
    chip.store(acc, shared + kM, kMScale);
    // A linear first row reads M only after the barriers that N needs.
    if (schedules.rows[level][0].c != 0) __syncthreads();
    float x_scale = 1;
    for (int t = 0; t < steps; t++) {
      const RootStep& s = schedules.rows[level][t];
      const bool last = t + 1 == steps;
      if (s.c != 0) {
        Chip::scale(acc, s.b / s.c * kMScale * kMScale);
        chip.product(acc, kM, kM);
        Chip::scale(acc, s.c / (kMScale * kMScale));
      } else {
        Chip::scale(acc, s.b);
      }
      chip.add_to_diagonal(acc, s.a);
      if (t == 0 && last) break;
      if (t == 0) {
        chip.store(acc, shared + kX, s.x_scale);
        x_scale = s.x_scale;
      }
      chip.store(acc, shared + kN, s.n_scale[0]);
      __syncthreads();
      if (t > 0) {
        Chip::zero(acc);
        chip.product(acc, kN, kX);
        Chip::scale(acc, 1 / (s.n_scale[0] * x_scale));
        if (last) break;
        __syncthreads();
        x_scale = s.x_scale;
        chip.store(acc, shared + kX, x_scale);
      }
      // M <- N^p M with p = 2^squarings * times
      int squarings = 0, times = p;
      for (; times % 2 == 0; times /= 2, squarings++) {
        Chip::zero(acc);
        chip.product(acc, kN, kN);
        __syncthreads();
        chip.store(acc, shared + kN,
                   s.n_scale[squarings + 1] / (s.n_scale[squarings] * s.n_scale[squarings]));
        __syncthreads();
      }
      for (; times > 0; times--) {
        Chip::zero(acc);
        chip.product(acc, kN, kM);
        Chip::scale(acc, 1 / (s.n_scale[squarings] * kMScale));
        __syncthreads();
        chip.store(acc, shared + kM, kMScale);
        __syncthreads();
      }
    }

    // acc holds X. Its scale: eigenvalues up to that of the lower bound.
    float least = 3e38f;
    Chip::each(acc, [&](int d, int h, int low, float& u, float& v) {
      if (chip.diagonal(d, h, low, 0)) least = u <= least ? u : least == least ? u : least;
      if (chip.diagonal(d, h, low, 1)) least = v <= least ? v : least == least ? v : least;
    });
    const float final_scale = schedules.rows[level][steps - 1].x_scale;
    __syncthreads();
    chip.store(acc, shared + kX, final_scale);
    const float back = PowerOfTwo(-shift / p)(float(pow(double(nu), -1.0 / p)));
    Chip::each(acc, [&](int d, int h, int low, float& u, float& v) {
      if (!chip.owner(d)) return;
      const int i = chip.row(low), j = chip.column(d, h);
      const int64_t into = at.matrix * e.target.batch;
      const auto put = [&](int r, int c, float value) {
        if (r >= n || c >= n) return;
        write(e.target, into + r * e.target.row + c * e.target.column, value);
        if (d > 0) write(e.target, into + c * e.target.row + r * e.target.column, value);
      };
      put(i, j, u * back);
      put(i, j + 1, v * back);
    });
    load(1 / nu);
    chip.store(acc, shared + kM, kMScale);

    float *y = vectors, *z = vectors + Memory::kRows * kProbes;
    float* of = reinterpret_cast<float*>(shared + kN);
    const auto start = [&] {  // Y = Omega, the fixed signs
      for (int i = tid; i < Memory::kRows * kProbes; i += Chip::kThreads)
        y[i] = i >= n * kProbes ? 0.f : schedules.signs[i / 32] >> i % 32 & 1 ? -1.f : 1.f;
      __syncthreads();
    };
    const auto multiply = [&](bool by_m) {  // Y <- B / nu Y, or X Y
      const char* m = shared + (by_m ? kM : kX);
      const float unscale = 1 / (by_m ? kMScale : final_scale);
      constexpr int kShare = kProbes / 2;  // columns a thread makes of its row
      const int row = tid / 2, column = tid % 2 * kShare;
      float out[kShare] = {};
      for (int j = 0; j < n; j++) {
        const float x = element<kNB>(m, row, j) * unscale;
#pragma unroll
        for (int i = 0; i < kShare; i++) out[i] += x * y[j * kProbes + column + i];
      }
#pragma unroll
      for (int i = 0; i < kShare; i++) z[row * kProbes + column + i] = row < n ? out[i] : 0.f;
      __syncthreads();
      float* other = y;
      y = z;
      z = other;
    };
    const auto change = [&](int before, int after) {  // ||X^after (B / nu) X^before Y - Y|| / ||Y||
      for (int i = tid; i < n * kProbes; i += Chip::kThreads) of[i] = y[i];  // read by this thread
      for (int i = 0; i <= before + after; i++) multiply(i == before);
      double error = 0, all = 0;
      for (int i = tid; i < n * kProbes; i += Chip::kThreads) {
        const double difference = double(y[i]) - double(of[i]);
        error += difference * difference;
        all += double(of[i]) * double(of[i]);
      }
      error = chip.sum(error, scratch);
      __syncthreads();
      all = chip.sum(all, scratch);
      __syncthreads();
      return float(sqrt(error / all));
    };
    start();
    const float residual = change(p - p / 2, p / 2);
    start();
    multiply(true);
    const float weighted = change(p, 0);
    const double negative = chip.sum(least > 0 ? 0 : 1, scratch);
    if (residual <= kResidualLimit && weighted <= weighted_limit && negative == 0)
      return finish(kRootConverged, steps, residual, shown);
    level = lowest + 4 < kRootLevels ? lowest + 4 : kRootLevels - 1;
  }
  finish(kRootFailed, 0, 0, shown);
}

template <int kNB>
int launch(const std::vector<Entry>& entries, const RootSchedules& schedules, const RootCall& call,
           const uint32_t* largest, const RootResults& results, void* stream) {
  constexpr auto kernel = root_kernel<kNB>;
  constexpr int kBytes = Layout<kNB>::kBytes;
  if (const int error = allow_shared<kernel>(kBytes); error != 0) return error;
  return for_each_table(
      entries, [](const Entry&) { return int64_t(1); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(kernel, dim3(blocks), dim3(kNB * 32), kBytes, stream, table, schedules, call,
               largest, results);
        return launched();
      });
}

float scale_for(double bound) {
  return float(std::ldexp(1.0, 14 - int(std::floor(std::log2(std::max(bound, 1e-3))))));
}

}  // namespace

RootSchedules root_schedules(int p) {
  RootSchedules all;
  all.p = p;
  for (int level = 0; level < kRootLevels; level++) {
    const double low = std::ldexp(1.0, -level);
    const auto rows = root_schedule(low, p, root_tolerance(kUnitRoundoff));
    all.steps[level] = int(rows.size());
    constexpr int kPoints = 512;
    std::vector<double> m, x(kPoints + 1, 1.0);
    for (int i = 0; i <= kPoints; i++) m.push_back(std::exp2(-double(level) * i / kPoints));
    for (size_t t = 0; t < rows.size() && t < size_t(kMostRootSteps); t++) {
      double most_n = 0, most_x = 0;
      for (size_t i = 0; i < m.size(); i++) {
        const double value = rows[t].a + m[i] * (rows[t].b + m[i] * rows[t].c);
        x[i] *= value;
        m[i] *= std::pow(value, p);
        most_n = std::max(most_n, std::abs(value));
        most_x = std::max(most_x, std::abs(x[i]));
      }
      RootStep& step = all.rows[level][t];
      step = {float(rows[t].a), float(rows[t].b), float(rows[t].c), scale_for(most_x), {}};
      for (int i = 0; i < 4; i++) step.n_scale[i] = scale_for(std::pow(most_n, 1 << i));
    }
  }
  uint32_t state = 1;
  for (int i = 0; i < 1024; i++) {
    state = state * 1664525u + 1013904223u;
    all.signs[i / 32] |= (state >> 31) << i % 32;
  }
  return all;
}

int64_t root_onchip_bytes(int rows) {
  return rows <= 32 ? Layout<2>::kBytes : rows <= 64 ? Layout<4>::kBytes : Layout<8>::kBytes;
}

int launch_inverse_root(const std::vector<Entry>& entries, const RootSchedules& schedules,
                        const RootCall& call, const uint32_t* largest, const RootResults& results,
                        void* stream) {
  if (entries.empty()) return 0;
  const int rows = entries[0].rows;
  if (rows <= 32) return launch<2>(entries, schedules, call, largest, results, stream);
  if (rows <= 64) return launch<4>(entries, schedules, call, largest, results, stream);
  return launch<8>(entries, schedules, call, largest, results, stream);
}

}  // namespace spectral_kernels::cuda
