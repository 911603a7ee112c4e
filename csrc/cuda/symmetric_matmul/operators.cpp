// gram on CUDA tensors.

#include "../../check.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/device.h"
#include "../base/tensors.h"
#include "product.h"

namespace spectral_kernels::cuda {
namespace {

// Whether products can read a 16-bit batch where it is: contiguous, in whole steps. Its products
// are then summed as they are, so that they overflow or vanish as those of torch do.
bool is_packed(const Entry& e) {
  const Matrices& m = e.source;
  return m.type != Type::kF32 && m.column == 1 && m.row == e.columns &&
         (e.count == 1 || m.batch == e.rows * e.columns) && e.columns % kPackedColumns == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

Tensor gram(const Tensor& x) {
  constexpr const char* kOp = "gram";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  check_not_double(x, kOp);
  const DeviceGuard guard(x.device());
  auto sizes = x.sizes().vec();
  sizes.back() = x.size(-2);
  const Tensor out = empty(sizes, x);
  if (x.numel() == 0) return zeros(sizes, x, x.scalar_type());
  ProductPlan plan;
  plan.f16 = x.scalar_type() != kBFloat16;
  plan.planes = plan.square_planes = x.scalar_type() == kFloat ? 2 : 1;
  const int device = device_number(x);
  if (plan.planes == 1) plan.wgmma = wgmma_multiprocessors(device);
  append(plan.entries, x, {}, out, 1, false);
  const bool direct = plan.entries.size() == 1 && is_packed(plan.entries[0]);
  plan.entries[0].packed.direct = direct;
  number(plan.entries);
  const int64_t packed = place_packed(plan.entries, plan.planes);
  place(plan, multiprocessors_of_kind(device));
  const Tensor largest = zeros({leading(x)}, x, kInt);
  const Tensor arrived = zeros({plan.tiling.tiles}, x, kInt);
  const Tensor parts = empty({plan.tiling.parts}, x, kFloat);
  const Tensor workspace = empty({direct ? 0 : packed}, x, kShort);
  ProductBuffers buffers;
  buffers.parts = parts.data_ptr<float>();
  buffers.arrived = reinterpret_cast<uint32_t*>(arrived.data_ptr());
  uint32_t* const bits = reinterpret_cast<uint32_t*>(largest.data_ptr());
  buffers.largest = bits;
  void* stream = stream_of(x);
  Product product;
  product.shape = Shape::kGram;
  product.format = {plan.planes, plan.f16};
  if (direct) {
    product.a = product.b = static_cast<const uint16_t*>(x.const_data_ptr());
  } else {
    Prologue prologue;
    prologue.f16 = plan.f16;
    prologue.planes = plan.planes;
    uint16_t* const x_packed = reinterpret_cast<uint16_t*>(workspace.data_ptr());
    check_launch(launch_largest(plan.entries, Of::kSource, bits, stream), kOp);
    check_launch(launch_prologue(plan.entries, prologue, bits, x_packed, {}, stream), kOp);
    product.a = product.b = x_packed;
    product.unshift = 2;
    product.x_f16 = plan.f16;
  }
  check_launch(launch_product(plan, product, buffers, stream), kOp);
  if (direct) check_launch(launch_spread_nonfinite(plan.entries, stream), kOp);
  return out;
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) { m.impl("gram", &boxed<&gram>); }

}  // namespace spectral_kernels::cuda
