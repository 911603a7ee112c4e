// A view of elements that somebody else keeps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <ostream>
#include <stdexcept>
#include <vector>

namespace spectral_kernels {

template <class T>
class ArrayRef {
 public:
  ArrayRef() = default;
  ArrayRef(const T* data, size_t size) : data_(data), size_(size) {}
  ArrayRef(const T& element) : ArrayRef(&element, 1) {}
  ArrayRef(const std::vector<T>& elements) : ArrayRef(elements.data(), elements.size()) {}
  template <size_t kCount>
  ArrayRef(const T (&elements)[kCount]) : ArrayRef(elements, kCount) {}
  // As an argument; the elements live as long as the call.
  ArrayRef(const std::initializer_list<T>& elements)
      : ArrayRef(std::data(elements), elements.size()) {}

  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const T& operator[](size_t i) const { return data_[i]; }
  const T& back() const { return data_[size_ - 1]; }
  ArrayRef slice(size_t first, size_t count) const {
    if (first > size_ || count > size_ - first) throw std::out_of_range("a slice of an array");
    return {data_ + first, count};
  }
  std::vector<T> vec() const { return std::vector<T>(begin(), end()); }

  friend bool operator==(ArrayRef a, ArrayRef b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  friend bool operator!=(ArrayRef a, ArrayRef b) { return !(a == b); }
  // [2, 3]
  friend std::ostream& operator<<(std::ostream& stream, ArrayRef a) {
    stream << '[';
    for (size_t i = 0; i < a.size(); i++) stream << (i == 0 ? "" : ", ") << a[i];
    return stream << ']';
  }

 private:
  const T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace spectral_kernels
