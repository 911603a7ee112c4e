// Input checks of the operators, and their wording. Python's public functions check first and raise
// TypeError or ValueError; these guard direct calls of torch.ops.spectral_kernels.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace spectral_kernels {

inline void check_matrix(const Tensor& t, const char* name) {
  CHECK_TYPE(t.layout().strided(), name, " must be a dense tensor, got layout ", t.layout());
  const auto type = t.scalar_type();
  CHECK_TYPE(type == kFloat || type == kDouble || type == kBFloat16 || type == kHalf, name,
             " must be float32, float64, bfloat16 or float16, got ", type);
  CHECK_VALUE(t.dim() >= 2, name, " must have at least two dimensions, got shape ", t.sizes());
}

inline void check_full_precision(const Tensor& t, const char* name) {
  check_matrix(t, name);
  CHECK_TYPE(t.scalar_type() == kFloat || t.scalar_type() == kDouble, name,
             " must be float32 or float64, got ", t.scalar_type());
}

inline void check_square(const Tensor& t, const char* name) {
  CHECK_VALUE(t.size(-1) == t.size(-2), name, " must be square, got shape ", t.sizes());
}

inline void check_same_shape(const Tensor& a, const char* a_name, const Tensor& b,
                             const char* b_name) {
  CHECK_VALUE(a.sizes() == b.sizes(), a_name, " has shape ", a.sizes(), " but ", b_name,
              " has shape ", b.sizes());
}

// Whether two elements may have one place. They have not if every dimension steps beyond all that
// the shorter steps reach together, which is so of everything that torch makes by slicing and
// permuting; a few layouts by as_strided are without overlap and yet not of this kind.
inline bool may_overlap(const Tensor& t) {
  if (t.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) > 1) steps.emplace_back(t.stride(d), t.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [step, size] : steps) {
    if (step <= reach) return true;
    reach += step * (size - 1);
  }
  return false;
}

// A tensor that will be written: every element must have a place of its own.
inline void check_writable(const Tensor& t, const char* name) {
  CHECK_VALUE(!may_overlap(t), name,
              " is written in place but its elements overlap in memory: shape ", t.sizes(),
              ", strides ", t.strides());
}

inline void check_list(TensorList list, const char* name, size_t count) {
  CHECK_VALUE(list.size() == count, name, " has ", list.size(), " entries, params has ", count);
}

inline void check_one_of(const std::string& value, const char* name,
                         std::initializer_list<const char*> choices) {
  std::string known;
  for (const char* choice : choices) {
    if (value == choice) return;
    known += (known.empty() ? "'" : ", '") + std::string(choice) + "'";
  }
  CHECK_VALUE(false, name, " is '", value, "', must be one of ", known);
}

}  // namespace spectral_kernels
