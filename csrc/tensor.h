// Tensors, and what the library asks of torch about them. This and boxing.h are all that it knows
// of torch, by C functions that every torch from 2.11 on has (LibTorch's stable ABI).
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <vector>

#include "array_ref.h"
#include "errors.h"

struct AtenTensorOpaque;  // torch's, which it hands out pointers to

namespace spectral_kernels {

using torch::headeronly::ScalarType;
constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double;
constexpr ScalarType kBFloat16 = ScalarType::BFloat16, kHalf = ScalarType::Half;
constexpr ScalarType kLong = ScalarType::Long, kInt = ScalarType::Int;
constexpr ScalarType kShort = ScalarType::Short, kByte = ScalarType::Byte;
constexpr ScalarType kBool = ScalarType::Bool;

using IntArrayRef = ArrayRef<int64_t>;

// Types by torch's own numbers for them.
struct Device {
  int32_t type, index;
  bool is_cpu() const;
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend std::ostream& operator<<(std::ostream& stream, Device device);
};
struct Layout {
  int32_t number;
  bool strided() const;
  friend std::ostream& operator<<(std::ostream& stream, Layout layout);
};

// A reference to one of torch's tensors. Shape and type are read once: nothing in this library
// changes them.
class Tensor {
 public:
  Tensor() = default;  // no tensor
  // Owns the handle from here on; it may refer to no tensor.
  explicit Tensor(AtenTensorOpaque* handle);

  bool defined() const { return record_ != nullptr; }
  AtenTensorOpaque* handle() const { return record_ ? record_->handle : nullptr; }
  int64_t dim() const { return int64_t(sizes().size()); }
  int64_t numel() const { return record_ ? record_->numel : 0; }
  IntArrayRef sizes() const { return record_ ? record_->sizes : IntArrayRef(); }
  IntArrayRef strides() const { return record_ ? record_->strides : IntArrayRef(); }
  // Negative dimensions count from the end.
  int64_t size(int64_t d) const { return of_dimension(sizes(), d); }
  int64_t stride(int64_t d) const { return of_dimension(strides(), d); }
  ScalarType scalar_type() const { return record_ ? record_->dtype : ScalarType::Undefined; }
  size_t element_size() const;
  Device device() const { return record_->device; }
  bool is_cpu() const { return device().is_cpu(); }
  Layout layout() const { return record_->layout; }
  bool is_contiguous() const;

  void* data_ptr() const;
  const void* const_data_ptr() const;
  template <class T>
  T* data_ptr() const {
    check_holds(dtype_of<T>());
    return static_cast<T*>(data_ptr());
  }
  template <class T>
  const T* const_data_ptr() const {
    check_holds(dtype_of<T>());
    return static_cast<const T*>(const_data_ptr());
  }

  const Tensor& copy_(const Tensor& from) const;
  // A view with a dimension of size one more.
  Tensor unsqueeze(int64_t d) const;
  // A view of the same memory.
  Tensor as_strided(IntArrayRef sizes, IntArrayRef strides, int64_t offset) const;

 private:
  struct Record {
    explicit Record(AtenTensorOpaque* owned);
    ~Record();
    Record(const Record&) = delete;
    Record& operator=(const Record&) = delete;

    AtenTensorOpaque* handle;
    int64_t numel;
    IntArrayRef sizes, strides;  // the tensor's own; no strides unless its layout has them
    int32_t type_number;
    ScalarType dtype;
    Device device;
    Layout layout;
  };

  template <class T>
  static constexpr ScalarType dtype_of() {
    return torch::headeronly::CppTypeToScalarType<T>::value;
  }
  static int64_t of_dimension(IntArrayRef numbers, int64_t d) {
    const int64_t count = int64_t(numbers.size()), place = d < 0 ? d + count : d;
    if (place < 0 || place >= count) throw std::out_of_range("a dimension that a tensor lacks");
    return numbers[size_t(place)];
  }
  void check_holds(ScalarType type) const;

  std::shared_ptr<const Record> record_;
};

using TensorList = ArrayRef<Tensor>;

// Contiguous tensors on the device of `like`, of its dtype or of another.
Tensor empty(IntArrayRef sizes, const Tensor& like, ScalarType dtype);
inline Tensor empty(IntArrayRef sizes, const Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}
inline Tensor empty_as(const Tensor& like) { return empty(like.sizes(), like); }
// With the strides of `like` too, which leave no gaps.
Tensor empty_with_strides(const Tensor& like);
Tensor zeros(IntArrayRef sizes, const Tensor& like, ScalarType dtype);
// A contiguous tensor in the CPU's memory that somebody else keeps.
Tensor from_blob(void* data, IntArrayRef sizes, ScalarType dtype);

// The number of threads that torch gives to a parallel section.
int torch_threads();
// Calls body(i) for i in [0, jobs) on that many threads, one call each. An exception is rethrown.
void torch_parallel(int64_t jobs, const std::function<void(int64_t)>& body);

}  // namespace spectral_kernels
