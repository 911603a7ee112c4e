// The C++ type of a storage dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "tiles.h"

namespace spectral_kernels::cpu {

// f(T{}).
template <class F>
auto with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF64:
      return f(double{});
    case DType::kBF16:
      return f(torch::headeronly::BFloat16{});
    case DType::kF16:
      break;
  }
  return f(torch::headeronly::Half{});
}

}  // namespace spectral_kernels::cpu
