// Tensors, and what the library asks of torch about them: the one header that names torch's types.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

namespace spectral_kernels {

using at::ArrayRef;
using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using at::TensorList;

using at::kBFloat16;
using at::kByte;
using at::kDouble;
using at::kFloat;
using at::kHalf;
using at::kInt;
using at::kLong;
using at::kShort;
using at::kStrided;

// Contiguous tensors on the device of `like`, of its dtype or of another.
inline Tensor empty(IntArrayRef sizes, const Tensor& like, ScalarType dtype) {
  return at::empty(sizes, like.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
}
inline Tensor empty(IntArrayRef sizes, const Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}
inline Tensor empty_as(const Tensor& like) { return empty(like.sizes(), like); }
inline Tensor zeros(IntArrayRef sizes, const Tensor& like, ScalarType dtype) {
  return at::zeros(sizes, like.options().dtype(dtype));
}

}  // namespace spectral_kernels

#define CHECK_VALUE TORCH_CHECK_VALUE
#define CHECK_TYPE TORCH_CHECK_TYPE
#define CHECK_IMPLEMENTED TORCH_CHECK_NOT_IMPLEMENTED
