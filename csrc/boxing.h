// Calls between torch and this library, through its stable interface of boxed values: how a
// function becomes an operator, and how operators of torch are called by name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor.h"

namespace spectral_kernels {

// One argument or result (StableIValue).
using Value = uint64_t;

// What a value holds, which is owned by the caller from here on. For Tensor, double, int64_t, bool,
// ScalarType, std::string, std::optional<double> and vectors of Tensor, double and int64_t.
template <class T>
T take(Value value);

struct None {};
// A value for torch. For Tensor, double, int64_t, bool, ScalarType, None, std::string,
// std::vector<int64_t>, and std::optional of bool, int64_t and std::vector<int64_t>.
template <class T>
Value give(const T& held);

template <>
double take<double>(Value value);
template <>
int64_t take<int64_t>(Value value);
template <>
bool take<bool>(Value value);
template <>
ScalarType take<ScalarType>(Value value);
template <>
std::string take<std::string>(Value value);
template <>
Tensor take<Tensor>(Value value);
template <>
std::optional<double> take<std::optional<double>>(Value value);
template <>
std::vector<Tensor> take<std::vector<Tensor>>(Value value);
template <>
std::vector<double> take<std::vector<double>>(Value value);
template <>
std::vector<int64_t> take<std::vector<int64_t>>(Value value);
template <>
Value give<double>(const double& held);
template <>
Value give<int64_t>(const int64_t& held);
template <>
Value give<bool>(const bool& held);
template <>
Value give<ScalarType>(const ScalarType& held);
template <>
Value give<None>(const None& held);
template <>
Value give<std::string>(const std::string& held);
template <>
Value give<Tensor>(const Tensor& held);
template <>
Value give<std::vector<int64_t>>(const std::vector<int64_t>& held);
template <>
Value give<std::optional<bool>>(const std::optional<bool>& held);
template <>
Value give<std::optional<int64_t>>(const std::optional<int64_t>& held);
template <>
Value give<std::optional<std::vector<int64_t>>>(const std::optional<std::vector<int64_t>>& held);

// Torch's numbers of types.
ScalarType type_of_number(int32_t number);
int32_t number_of_type(ScalarType type);

// Both throw TorchError with torch's own words, as far as this torch tells them.
void check_torch(int32_t error, const char* what);
void call_by_name(const char* name, const char* overload, Value* stack);

// What a row of values holds.
template <class... Types>
std::tuple<Types...> take_all(const Value* values) {
  const auto take_each = [values]<size_t... kPlace>(std::index_sequence<kPlace...>) {
    return std::tuple<Types...>{take<Types>(values[kPlace])...};
  };
  return take_each(std::index_sequence_for<Types...>());
}

// The result of one of torch's operators; all arguments of its schema must be given.
template <class Result, class... Arguments>
Result called(const char* name, const char* overload, const Arguments&... arguments) {
  Value stack[std::max<size_t>(sizeof...(Arguments), 1)] = {give(arguments)...};
  call_by_name(name, overload, stack);
  return take<Result>(stack[0]);
}

// The same of operators with several results.
template <class... Results, class... Arguments>
std::tuple<Results...> called_for(const char* name, const char* overload,
                                  const Arguments&... arguments) {
  Value stack[std::max(sizeof...(Arguments), sizeof...(Results))] = {give(arguments)...};
  call_by_name(name, overload, stack);
  return take_all<Results...>(stack);
}

// A function as torch calls it:
//
//   m.impl("gram", &boxed<&gram>);
template <auto kFunction>
struct Boxed;

template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Boxed<kFunction> {
  static void call(Value* stack, uint64_t count, uint64_t) {
    if (count != sizeof...(Arguments))
      throw std::logic_error("a schema and its function differ in their arguments");
    std::tuple arguments = take_all<std::decay_t<Arguments>...>(stack);
    if constexpr (std::is_void_v<Result>)
      std::apply(kFunction, arguments);
    else
      put(stack, std::apply(kFunction, arguments));
  }

 private:
  static void put(Value* stack, const Tensor& result) { stack[0] = give(result); }
  template <class... Tensors>
  static void put(Value* stack, const std::tuple<Tensors...>& results) {
    size_t next = 0;
    std::apply([&](const auto&... each) { ((stack[next++] = give(each)), ...); }, results);
  }
};

template <auto kFunction>
void boxed(Value* stack, uint64_t count, uint64_t results) {
  Boxed<kFunction>::call(stack, count, results);
}

// The names of an operator's arguments, as ops.cpp has them.
struct Schema {
  std::string name;
  std::vector<std::string> arguments;
};
const Schema& schema_of(const std::string& name);

// The arguments of one call by name. Each has to be taken once.
class CallArguments {
 public:
  CallArguments(const Schema& schema, const Value* stack) : schema_(&schema), stack_(stack) {}

  template <class T>
  T take_named(const char* name) {
    return take<T>(stack_[place_of(name)]);
  }
  void check_all_taken() const;

 private:
  size_t place_of(const char* name);

  const Schema* schema_;
  const Value* stack_;
  size_t next_ = 0, taken_ = 0;
};

}  // namespace spectral_kernels
