#include "boxing.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

// Torch's words for the last error of this thread, from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace spectral_kernels {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// A list of torch's, which is dropped when it has been read.
class List {
 public:
  explicit List(Value value) : handle_(to<StableListHandle>(value)) {}
  ~List() { torch_delete_list(handle_); }
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  size_t size() const {
    size_t count = 0;
    check_torch(torch_list_size(handle_, &count), "a list");
    return count;
  }
  Value operator[](size_t i) const {
    Value element = 0;
    check_torch(torch_list_get_item(handle_, i, &element), "a list");
    return element;
  }

 private:
  StableListHandle handle_;
};

template <class T>
std::vector<T> take_list(Value value) {
  const List list(value);
  std::vector<T> elements;
  const size_t count = list.size();
  elements.reserve(count);
  for (size_t i = 0; i < count; i++) elements.push_back(take<T>(list[i]));
  return elements;
}

}  // namespace

template <>
double take<double>(Value value) {
  return to<double>(value);
}
template <>
int64_t take<int64_t>(Value value) {
  return to<int64_t>(value);
}
template <>
bool take<bool>(Value value) {
  return to<bool>(value);
}
template <>
ScalarType take<ScalarType>(Value value) {
  return type_of_number(to<int32_t>(value));
}
template <>
std::string take<std::string>(Value value) {
  return to<std::string>(value);
}
template <>
Tensor take<Tensor>(Value value) {
  return Tensor(to<AtenTensorHandle>(value));
}
template <>
std::optional<double> take<std::optional<double>>(Value value) {
  return to<std::optional<double>>(value);
}
template <>
std::vector<Tensor> take<std::vector<Tensor>>(Value value) {
  return take_list<Tensor>(value);
}
template <>
std::vector<double> take<std::vector<double>>(Value value) {
  return take_list<double>(value);
}
template <>
std::vector<int64_t> take<std::vector<int64_t>>(Value value) {
  return take_list<int64_t>(value);
}

template <>
Value give<double>(const double& held) {
  return from(held);
}
template <>
Value give<int64_t>(const int64_t& held) {
  return from(held);
}
template <>
Value give<bool>(const bool& held) {
  return from(held);
}
template <>
Value give<ScalarType>(const ScalarType& held) {
  return from(number_of_type(held));
}
template <>
Value give<None>(const None&) {
  return from(std::nullopt);
}
template <>
Value give<std::string>(const std::string& held) {
  return from(held);
}
template <>
Value give<std::vector<int64_t>>(const std::vector<int64_t>& held) {
  return from(held);
}
template <>
Value give<std::optional<bool>>(const std::optional<bool>& held) {
  return from(held);
}
template <>
Value give<std::optional<int64_t>>(const std::optional<int64_t>& held) {
  return from(held);
}
template <>
Value give<std::optional<std::vector<int64_t>>>(const std::optional<std::vector<int64_t>>& held) {
  return from(held);
}
template <>
Value give<Tensor>(const Tensor& held) {
  AtenTensorHandle handle = nullptr;
  check_torch(held.defined() ? aoti_torch_new_tensor_handle(held.handle(), &handle)
                             : aoti_torch_new_uninitialized_tensor(&handle),
              "a tensor's handle");
  return reinterpret_cast<Value>(handle);
}

void check_torch(int32_t error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const char* words = torch_exception_get_what_without_backtrace == nullptr
                          ? nullptr
                          : torch_exception_get_what_without_backtrace();
  throw TorchError(std::string(what) + " failed in torch" +
                   (words == nullptr ? "" : std::string(": ") + words));
}

void call_by_name(const char* name, const char* overload, Value* stack) {
  check_torch(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), name);
}

size_t CallArguments::place_of(const char* name) {
  // Records have the order of their schema, mostly: the search begins behind the last one found.
  const size_t count = schema_->arguments.size();
  for (size_t tried = 0; tried < count; tried++, next_++) {
    if (next_ >= count) next_ = 0;
    if (schema_->arguments[next_] == name) {
      taken_++;
      return next_++;
    }
  }
  throw std::logic_error(schema_->name + " has no argument " + name);
}

void CallArguments::check_all_taken() const {
  if (taken_ != schema_->arguments.size())
    throw std::logic_error(schema_->name + " has arguments that its records lack");
}

}  // namespace spectral_kernels
