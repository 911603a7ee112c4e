// Everything in fp64, one block a matrix. The residual is taken before the root is made: both have
// the same shared memory.
#include "../base/kernel_table.h"
#include "../base/launch.h"
#include "eigen_root.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = 256, kProbes = 8;
constexpr double kUnitRoundoff = 0x1p-24, kUnitRoundoff64 = 0x1p-53;
constexpr double kMostResidual = 0.25;

__global__ void __launch_bounds__(kThreads, 1)
    eigen_root_kernel(const __grid_constant__ Table table,
                      const __grid_constant__ RootSchedules schedules, const EigenResults eigen,
                      const RootResults results) {
  DYNAMIC_SHARED(double, shared);
  const Place at = place(table, blockIdx.x, [](const Entry&) { return int64_t(1); });
  const Entry& e = *at.entry;
  const int n = e.rows, p = schedules.p, tid = threadIdx.x;
  const int64_t matrix = e.first + at.matrix, outcome = results.status[matrix];
  if (outcome >= 0) return;
  const double* values = eigen.values + matrix * n;
  const double* vectors = eigen.vectors + e.square + at.matrix * n * n;
  double *spectrum = shared, *weight = spectrum + n, *memory = weight + n;

  const double ridge = double(results.delta[matrix]), least = values[n - 1];
  const double largest = values[0] > 0 ? values[0] : 0;
  const double of_rounding = 4 * n * kUnitRoundoff64;
  const double cut = 4 * kUnitRoundoff > of_rounding ? 4 * kUnitRoundoff : of_rounding;
  const double least_kept = ridge > 0 ? 0 : cut * largest;
  const double least_checked = (cut > 1e-12 ? cut : 1e-12) * (largest + ridge);
  bool full = true;
  for (int j = 0; j < n; j++) full = full && (values[j] > 0 ? values[j] : 0) + ridge > least_kept;
  for (int j = tid; j < n; j += kThreads) spectrum[j] = (values[j] < 0 ? 0 : values[j]) + ridge;
  const auto power = [&](int j, double exponent) {
    return spectrum[j] > least_kept ? pow(spectrum[j], exponent / p) : 0;
  };

  // || (X^floor(p/2) (A + delta I) X^ceil(p/2) - I) Omega ||_F / || Omega ||_F on the eigenvectors
  // that rounding leaves to be checked
  double *y = memory, *z = y + n * kProbes, *wanted = z + n * kProbes,
         *turned = wanted + n * kProbes;
  const auto omega = [&](int i) { return schedules.signs[i / 32] >> i % 32 & 1 ? -1. : 1.; };
  const auto apply = [&](double exponent, const double* from, double* to) {
    for (int j = tid; j < n; j += kThreads)
      weight[j] = spectrum[j] > least_checked ? power(j, exponent) : 0;
    __syncthreads();
    for (int i = tid; i < n * kProbes; i += kThreads) {
      const int column = i / kProbes, probe = i % kProbes;
      double sum = 0;
      for (int k = 0; k < n; k++) sum += vectors[k * n + column] * from[k * kProbes + probe];
      turned[i] = sum * weight[column];
    }
    __syncthreads();
    for (int i = tid; i < n * kProbes; i += kThreads) {
      const int row = i / kProbes, probe = i % kProbes;
      double sum = 0;
      for (int k = 0; k < n; k++) sum += vectors[row * n + k] * turned[k * kProbes + probe];
      to[i] = sum;
    }
    __syncthreads();
  };
  for (int i = tid; i < n * kProbes; i += kThreads) y[i] = omega(i);
  apply(0, y, wanted);
  apply(-(p - p / 2), y, z);
  const int64_t from = at.matrix * e.source.batch;
  for (int i = tid; i < n * kProbes; i += kThreads) {
    const int row = i / kProbes, probe = i % kProbes;
    double sum = ridge * z[i];
    for (int k = 0; k < n; k++)
      sum += .5 *
             (double(read(e.source, from + row * e.source.row + k * e.source.column)) +
              double(read(e.source, from + k * e.source.row + row * e.source.column))) *
             z[k * kProbes + probe];
    y[i] = sum;
  }
  apply(-(p / 2), y, z);
  double error = 0;
  if (tid < 32) {
    for (int i = tid; i < n * kProbes; i += 32) error += (z[i] - wanted[i]) * (z[i] - wanted[i]);
    for (int mask = 16; mask; mask >>= 1) error += __shfl_xor_sync(~0u, error, mask);
  }
  if (tid == 0) {
    const double residual = sqrt(error / (n * kProbes));
    const bool indefinite = least < -sqrt(double(n)) * cut * largest;
    int64_t status = outcome == kRootFailed ? kRootFellBack : kRootConverged;
    if (!full) status = kRootRankDeficient;
    if (indefinite || !(residual <= kMostResidual)) status = kRootStagnated;
    results.status[matrix] = status;
    results.steps[matrix] = 0;
    results.residual[matrix] = float(residual);
  }

  // V spectrum^(-1/p) Vᵀ from its halves, column by column in memory
  for (int j = tid; j < n; j += kThreads) weight[j] = power(j, -.5);
  __syncthreads();
  for (int i = tid; i < n * n; i += kThreads)
    memory[i % n * n + i / n] = vectors[i] * weight[i % n];
  __syncthreads();
  for (int i = tid; i < n * n; i += kThreads) {
    const int row = i / n, column = i % n;
    if (column > row) continue;
    double sum = 0;
    for (int k = 0; k < n; k++) sum += memory[k * n + row] * memory[k * n + column];
    const int64_t into = at.matrix * e.target.batch;
    write(e.target, into + row * e.target.row + column * e.target.column, float(sum));
    write(e.target, into + column * e.target.row + row * e.target.column, float(sum));
  }
}

}  // namespace

int launch_eigen_root(const std::vector<Entry>& entries, const RootSchedules& schedules,
                      const EigenResults& eigen, const RootResults& results, void* stream) {
  if (entries.empty()) return 0;
  const size_t n = size_t(entries[0].rows), probes = 4 * kProbes;
  const size_t bytes = (2 * n + n * (n > probes ? n : probes)) * sizeof(double);
  if (const int error = allow_shared<eigen_root_kernel>(bytes); error != 0) return error;
  return for_each_table(
      entries, [](const Entry&) { return int64_t(1); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(eigen_root_kernel, dim3(blocks), dim3(kThreads), bytes, stream, table, schedules,
               eigen, results);
        return launched();
      });
}

}  // namespace spectral_kernels::cuda
