// Tensors as strided matrices for the kernels.
#pragma once

#include "../tensor.h"
#include "product.h"
#include "tiles.h"

namespace spectral_kernels::cpu {

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case kFloat:
      return DType::kF32;
    case kDouble:
      return DType::kF64;
    case kBFloat16:
      return DType::kBF16;
    case kHalf:
      return DType::kF16;
    default:
      CHECK_TYPE(false, "expected a floating-point tensor, got ", type);
  }
}

// The last two dimensions are a matrix, the leading ones a batch with any strides.
class MatrixBatch {
 public:
  explicit MatrixBatch(const Tensor& t) : tensor_(&t) {
    count_ = 1;
    for (int64_t d = 0; d + 2 < t.dim(); d++) count_ *= t.size(d);
  }
  int64_t count() const { return count_; }
  int64_t rows() const { return tensor_->size(-2); }
  int64_t cols() const { return tensor_->size(-1); }
  Matrix operator[](int64_t i) const {
    const Tensor& t = *tensor_;
    int64_t offset = 0;
    for (int64_t d = t.dim() - 3; d >= 0; d--) {
      offset += i % t.size(d) * t.stride(d);
      i /= t.size(d);
    }
    const DType dtype = dtype_of(t.scalar_type());
    char* data = static_cast<char*>(t.data_ptr()) + offset * int64_t(element_size(dtype));
    return {data, rows(), cols(), t.stride(-2), t.stride(-1), dtype};
  }

 private:
  const Tensor* tensor_;
  int64_t count_;
};

}  // namespace spectral_kernels::cpu
