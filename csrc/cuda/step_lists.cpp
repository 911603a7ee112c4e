#include "step_lists.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "tensors.h"

namespace spectral_kernels::cuda {

Counter counter_of(const at::Tensor& steps, int64_t first, int64_t count) {
  Counter c;
  c.first = first;
  c.count = count;
  c.steps = steps.data_ptr();
  c.type = type_of(steps.scalar_type());
  c.integer = steps.scalar_type() == at::kLong;
  c.each = steps.numel() > 1;
  return c;
}

void raise_nonfinite(const std::vector<Entry>& entries, at::TensorList params,
                     const char* momentum_name, const at::Tensor& largest, const char* op) {
  for (const Of of : {Of::kSource, Of::kMomentum}) {
    check_launch(launch_largest(entries, of, reinterpret_cast<uint32_t*>(largest.data_ptr()),
                                stream_of(largest)),
                 op);
    const at::Tensor found = largest.cpu();
    const int32_t* bits = found.const_data_ptr<int32_t>();
    for (size_t i = 0; i < params.size(); i++)
      for (int64_t j = 0; params[i].numel() > 0 && j < leading(params[i]); j++)
        TORCH_CHECK_VALUE(uint32_t(*bits++) < kInfinityBits,
                          of == Of::kSource ? "grads" : momentum_name, "[", i,
                          "] has a non-finite element (matrix ", j, ")");
  }
}

void raise_nonfinite(at::TensorList list, const char* name, const char* op) {
  for (size_t i = 0; i < list.size(); i++) {
    if (list[i].numel() == 0) continue;
    std::vector<Entry> entries;
    append(entries, list[i], {}, list[i], 1, false);
    number(entries);
    const at::Tensor largest = at::zeros({leading(list[i])}, list[i].options().dtype(at::kInt));
    check_launch(
        launch_largest(entries, Of::kSource, reinterpret_cast<uint32_t*>(largest.data_ptr()),
                       stream_of(largest)),
        op);
    const at::Tensor found = largest.cpu();
    for (int64_t j = 0; j < leading(list[i]); j++)
      TORCH_CHECK_VALUE(uint32_t(found.const_data_ptr<int32_t>()[j]) < kInfinityBits, name, "[", i,
                        "] has a non-finite element (matrix ", j, ")");
  }
}

}  // namespace spectral_kernels::cuda
