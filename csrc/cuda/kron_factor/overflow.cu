// The guard of factors that are updated in place.
#include "../base/kernel_table.h"
#include "../base/launch.h"
#include "../base/reduce.h"
#include "overflow.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = 256, kRows = 32;  // of a block; a warp looks at one row at a time
constexpr double kMost = 0x1.fffffep127;

HOST_DEVICE int64_t parts_of(const Entry& e) { return (e.rows + kRows - 1) / kRows; }

// The largest element of a semidefinite matrix is on its diagonal, and its sum of squares is only
// formed where a bound leaves it open.
__global__ void __launch_bounds__(kThreads, 1)
    overflow_kernel(const __grid_constant__ Table table, const uint32_t* largest,
                    uint32_t* overflow) {
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return parts_of(e); });
  const Entry& e = *at.entry;
  const Matrices &x = e.source, &factor = e.momentum;
  const int64_t matrix = e.first + at.matrix;
  const uint32_t most = largest[matrix];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double bound = double(e.scale) * double(float_of(most)) * float_of(most) * e.columns;
  bool bad = !finite(most);
  uint32_t known = 0;  // this thread's share of the lower triangle, which is what is read
  for (int64_t row = at.part * kRows + warp; row < e.rows && !bad; row += kThreads / 32) {
    if (row >= (at.part + 1) * kRows) break;
    const int64_t corner = at.matrix * factor.batch + row * (factor.row + factor.column);
    const double old = fabs(double(e.keep) * read(factor, corner));
    for (int64_t i = lane; i <= row; i += 32)
      known = larger(known, size_bits(read(factor, at.matrix * factor.batch + row * factor.row +
                                                       i * factor.column)));
    double sum = 0;
    if (!(old + bound <= kMost / 2)) {
      for (int64_t i = lane; i < e.columns; i += 32) {
        const double value = read(x, at.matrix * x.batch + row * x.row + i * x.column);
        sum += value * value;
      }
      for (int mask = 16; mask; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    }
    bad = !(old + e.scale * sum <= kMost);
  }
  if ((bad && lane == 0) || !finite(known)) atomicMax(overflow + matrix, kInfinityBits);
}

}  // namespace

int launch_overflow(const std::vector<Entry>& entries, const uint32_t* largest, uint32_t* overflow,
                    void* stream) {
  return for_each_table(
      entries, [](const Entry& e) { return parts_of(e); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(overflow_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, largest, overflow);
        return launched();
      });
}

}  // namespace spectral_kernels::cuda
