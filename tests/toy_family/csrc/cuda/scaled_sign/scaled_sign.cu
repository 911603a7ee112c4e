// The signs of a matrix, times a number.
#include "../base/kernel_table.h"
#include "../base/launch.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kElements = 4096;  // of a block

HOST_DEVICE int64_t parts_of(const Entry& e) {
  return (e.rows * e.columns + kElements - 1) / kElements;
}

__global__ void __launch_bounds__(kThreads)
    scaled_sign_kernel(const __grid_constant__ Table table, const uint32_t* largest) {
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return parts_of(e); });
  const Entry& e = *at.entry;
  const bool usable = finite(largest[e.first + at.matrix]);
  const int64_t begin = at.part * kElements, all = e.rows * e.columns;
  const int64_t end = begin + kElements < all ? begin + kElements : all;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t row = i / e.columns, column = i % e.columns;
    const float x =
        read(e.source, at.matrix * e.source.batch + row * e.source.row + column * e.source.column);
    const float sign = float(x > 0) - float(x < 0);
    write(e.target, at.matrix * e.target.batch + row * e.target.row + column * e.target.column,
          usable ? e.scale * sign : float_of(0x7fc00000u));
  }
}

}  // namespace

int launch_scaled_sign(const std::vector<Entry>& entries, const uint32_t* largest, void* stream) {
  return for_each_table(
      entries, [](const Entry& e) { return parts_of(e); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(scaled_sign_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, largest);
        return launched();
      });
}

}  // namespace spectral_kernels::cuda
