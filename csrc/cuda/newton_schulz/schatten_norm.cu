#include "../base/launch.h"
#include "../base/reduce.h"
#include "../symmetric_matmul/tile.h"
#include "schatten_norm.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;  // of a block, no more blocks than the prologue has for a matrix

HOST_DEVICE int64_t row_parts(const Entry& e) { return over(e.rows, kRows); }

// `scale` is that of the square that is stored.
__global__ void __launch_bounds__(kThreads)
    schatten8_kernel(const __grid_constant__ Table table, const uint16_t* squares, Format format,
                     bool x_f16, float scale, const uint32_t* largest, const Norms norms) {
  DYNAMIC_SHARED(double, warps);
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return row_parts(e); });
  const Entry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix, line = square_line(e), plane = e.rows * line;
  const uint16_t* square = squares + e.square + at.matrix * plane * 2;
  const int64_t begin = at.part * kRows, end = begin + kRows < e.rows ? begin + kRows : e.rows;
  double share = 0;
  for (int64_t i = 2 * int64_t(threadIdx.x); i < (end - begin) * line; i += 2 * kThreads) {
    const float2 pair = load_pair(square + begin * line + i, plane, format);
    share += double(pair.x) * double(pair.x) + double(pair.y) * double(pair.y);
  }
  share = sum_of_block<kThreads>(share, warps);
  double total;
  if (!last_total<kThreads>(share, norms.squares + e.packed.norm + at.matrix * row_parts(e),
                            at.part, row_parts(e), norms.arrived + matrix, warps, total))
    return;
  if (threadIdx.x != 0) return;
  const float frobenius = norms.factor[matrix];
  if (!(frobenius > 0)) return;
  const double own = sqrt(sqrt(sqrt(total) / double(scale))) / double(frobenius);
  norms.factor[matrix] = inverse_of(
      divisor_of(own * norms.norm_factor, norms.eps, pack_shift(largest[matrix], x_f16)));
}

}  // namespace

int launch_schatten_norm(const ProductPlan& plan, const ProductWorkspaces& workspaces,
                         const Norms& norms, float norm_factor, float eps, void* stream) {
  const Format x_format{plan.planes, plan.f16};
  const Format format = plan.square_planes == 2 ? Format{2, true} : x_format;
  // Elements of X Xᵀ are at most 1, and those of its square may be as small as 1 / n².
  const float scale = format.f16 ? 32768.f : 1.f;
  Product gram;
  gram.shape = Shape::kGram;
  gram.format = x_format;
  gram.a = gram.b = workspaces.x;
  gram.d = workspaces.squares;
  gram.d_format = format;
  gram.alpha = scale;
  gram.factor = norms.factor;
  gram.power = 2;
  Product square;
  square.format = square.d_format = format;
  square.a = square.b = gram.d;
  square.d = workspaces.squares + plan.tiling.squares;
  square.alpha = 1 / scale;
  for (const Product* product : {&gram, &square})
    if (const int error = launch_product(plan, *product, workspaces.buffers, stream); error != 0)
      return error;
  Norms wanted = norms;
  wanted.norm_factor = norm_factor;
  wanted.eps = eps;
  return for_each_table(plan.entries, row_parts, [&](const Table& table, unsigned blocks) {
    LAUNCH(schatten8_kernel, dim3(blocks), dim3(kThreads), kReduceBytes<kThreads>, stream, table,
           square.d, format, plan.f16, scale, workspaces.buffers.largest, wanted);
    return launched();
  });
}

}  // namespace spectral_kernels::cuda
