// Torch's operators by their names, as far as the CUDA part uses them: what is small, and what is
// not written here.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../boxing.h"

namespace spectral_kernels::cuda {

inline Tensor unary(const char* name, const Tensor& x) { return called<Tensor>(name, "", x); }

inline Tensor converted(const Tensor& x, ScalarType dtype) {
  return called<Tensor>("aten::to", "dtype", x, dtype, false, false, None{});
}
inline Tensor reshaped(const Tensor& x, IntArrayRef sizes) {
  return called<Tensor>("aten::reshape", "", x, sizes.vec());
}
inline Tensor viewed(const Tensor& x, IntArrayRef sizes) {
  return called<Tensor>("aten::view", "", x, sizes.vec());
}
inline Tensor select(const Tensor& x, int64_t dim, int64_t index) {
  return called<Tensor>("aten::select", "int", x, dim, index);
}
inline Tensor narrow(const Tensor& x, int64_t dim, int64_t start, int64_t length) {
  return called<Tensor>("aten::narrow", "", x, dim, start, length);
}
inline Tensor transposed_matrix(const Tensor& x) {
  return called<Tensor>("aten::transpose", "int", x, int64_t(-2), int64_t(-1));
}
inline Tensor diagonal(const Tensor& x) {
  return called<Tensor>("aten::diagonal", "", x, int64_t(0), int64_t(0), int64_t(1));
}
inline Tensor cloned(const Tensor& x) { return called<Tensor>("aten::clone", "", x, None{}); }
// A copy in the CPU's memory, which is waited for.
Tensor on_cpu(const Tensor& x);

// The stable interface does not pass numbers for arguments of the type Scalar, so that they are
// filled in or subtracted by functions of their own, or become tensors.
void fill(const Tensor& x, double value);
// a - factor b
Tensor difference(const Tensor& a, const Tensor& b, double factor);

inline Tensor filled(IntArrayRef sizes, const Tensor& like, double value) {
  const Tensor made = empty(sizes, like);
  fill(made, value);
  return made;
}
// Of no dimension.
inline Tensor number_like(const Tensor& like, double value) { return filled({}, like, value); }
inline Tensor identity(int64_t n, const Tensor& like) {
  const Tensor made = zeros({n, n}, like, like.scalar_type());
  fill(diagonal(made), 1);
  return made;
}

inline Tensor operator*(const Tensor& a, const Tensor& b) {
  return called<Tensor>("aten::mul", "Tensor", a, b);
}
inline Tensor operator*(const Tensor& a, double b) { return a * number_like(a, b); }
inline Tensor operator/(const Tensor& a, const Tensor& b) {
  return called<Tensor>("aten::div", "Tensor", a, b);
}
inline Tensor operator+(const Tensor& a, const Tensor& b) { return difference(a, b, -1); }
inline Tensor operator-(const Tensor& a, const Tensor& b) { return difference(a, b, 1); }
inline Tensor operator<=(const Tensor& a, const Tensor& b) {
  return called<Tensor>("aten::le", "Tensor", a, b);
}
inline Tensor is_negative(const Tensor& x) {
  return called<Tensor>("aten::lt", "Tensor", x, number_like(x, 0));
}
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  return called<Tensor>("aten::where", "self", condition, a, b);
}

inline Tensor absolute(const Tensor& x) { return unary("aten::abs", x); }
inline Tensor maximum_of(const Tensor& x) { return unary("aten::max", x); }
inline Tensor total(const Tensor& x) { return called<Tensor>("aten::sum", "", x, None{}); }
inline Tensor column_totals(const Tensor& x) {
  return called<Tensor>("aten::sum", "dim_IntList", x, std::optional(std::vector<int64_t>{0}),
                        false, None{});
}
inline Tensor upper_triangle(const Tensor& x, int64_t above) {
  return called<Tensor>("aten::triu", "", x, above);
}
inline Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index) {
  return called<Tensor>("aten::index_select", "", x, dim, index);
}
// Falling values, with the places where they stood; equal ones in the order in which they stood.
inline std::tuple<Tensor, Tensor> sorted(const Tensor& x) {
  return called_for<Tensor, Tensor>("aten::sort", "stable", x, std::optional(true), int64_t(-1),
                                    true);
}

// The value of the only element.
double number_of(const Tensor& x);
inline bool all_finite(const Tensor& x) {
  return number_of(converted(unary("aten::all", unary("aten::isfinite", x)), kDouble)) != 0;
}

}  // namespace spectral_kernels::cuda
