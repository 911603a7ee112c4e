// Calls of the list steps as records: their lists, and their options as _options.py has them. Both
// are read from the dispatcher's stack by the names of the schema in ops.cpp, so that a new option
// is a line there, a line here, and what the backends make of it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace spectral_kernels {

// Reads arguments by name while a record is made.
class FromCall {
 public:
  FromCall(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : schema_(&op.schema()), stack_(&stack) {}

 protected:
  std::vector<Tensor> tensors(const char* name) { return value(name).toTensorVector(); }
  Tensor tensor(const char* name) { return value(name).toTensor(); }
  double number(const char* name) { return value(name).toDouble(); }
  std::optional<double> number_or_none(const char* name) {
    return value(name).toOptional<double>();
  }
  std::vector<double> numbers(const char* name) { return value(name).toDoubleVector(); }
  int64_t integer(const char* name) { return value(name).toInt(); }
  std::vector<int64_t> integers(const char* name) { return value(name).toIntVector(); }
  bool flag(const char* name) { return value(name).toBool(); }
  std::string text(const char* name) { return value(name).toStringRef(); }
  ScalarType dtype(const char* name) { return value(name).toScalarType(); }

 private:
  // Records have the order of their schema, mostly: the search begins behind the last one found.
  const c10::IValue& value(const char* name) {
    const auto& arguments = schema_->arguments();
    for (size_t tried = 0; tried < arguments.size(); tried++, next_++) {
      if (next_ >= arguments.size()) next_ = 0;
      if (arguments[next_].name() == name)
        return torch::jit::peek(*stack_, next_++, arguments.size());
    }
    TORCH_INTERNAL_ASSERT(false, schema_->name(), " has no argument ", name);
  }

  const c10::FunctionSchema* schema_;  // both are there as long as the call
  const torch::jit::Stack* stack_;
  size_t next_ = 0;
};

// What every step has.
struct StepLists : FromCall {
  using FromCall::FromCall;
  std::vector<Tensor> params = tensors("params"), grads = tensors("grads");
  std::vector<Tensor> step_counts = tensors("step_counts");
  Tensor skipped = tensor("skipped"), lr = tensor("lr");
};

struct MuonLists : StepLists {
  using StepLists::StepLists;
  std::vector<Tensor> momentum_buffers = tensors("momentum_buffers");
  std::vector<Tensor> second_moments = tensors("second_moments");
};

struct MuonOptions : FromCall {
  using FromCall::FromCall;
  double momentum = number("momentum");
  bool nesterov = flag("nesterov");
  std::optional<double> beta2 = number_or_none("beta2");
  double neuron_eps = number("neuron_eps");
  double weight_decay = number("weight_decay");
  bool cautious = flag("cautious");
  bool hyperball = flag("hyperball");
  std::vector<double> rows = numbers("rows");
  std::vector<double> scales = numbers("scales");
  std::string method = text("method");
  std::vector<int64_t> restarts = integers("restarts");
  std::vector<int64_t> restart_ends = integers("restart_ends");
  ScalarType compute_dtype = dtype("compute_dtype");
  double eps = number("eps");
  std::string norm = text("norm");
  double norm_factor = number("norm_factor");
  bool maximize = flag("maximize");
  std::string nonfinite = text("nonfinite");

  // Those of entry i; the ends have been checked.
  IntArrayRef restarts_of(size_t i) const {
    if (restart_ends.empty()) return {};
    const int64_t begin = i == 0 ? 0 : restart_ends[i - 1];
    return IntArrayRef(restarts).slice(size_t(begin), size_t(restart_ends[i] - begin));
  }
};

struct ShampooLists : StepLists {
  using StepLists::StepLists;
  std::vector<Tensor> momentum_buffers = tensors("momentum_buffers");
  std::vector<Tensor> lefts = tensors("lefts"), rights = tensors("rights");
  std::vector<Tensor> left_roots = tensors("left_roots"), right_roots = tensors("right_roots");
  std::vector<Tensor> graft_squares = tensors("graft_squares");
  std::vector<Tensor> root_failures = tensors("root_failures");
};

struct ShampooOptions : FromCall {
  using FromCall::FromCall;
  double beta1 = number("beta1"), beta2 = number("beta2");
  double graft_beta2 = number("graft_beta2");
  int64_t root = integer("root");
  double ridge = number("ridge"), relative_ridge = number("relative_ridge");
  std::string root_method = text("root_method");
  double weight_decay = number("weight_decay");
  std::string graft = text("graft");
  double graft_eps = number("graft_eps");
  std::string graft_eps_mode = text("graft_eps_mode");
  bool kl = flag("kl");
  std::string kl_order = text("kl_order");
  bool debias = flag("debias");
  bool maximize = flag("maximize");
  std::string nonfinite = text("nonfinite");
  std::vector<int64_t> refresh = integers("refresh");
};

// Of the steps in eigenbases.
struct BasisLists : StepLists {
  using StepLists::StepLists;
  std::vector<Tensor> exp_avgs = tensors("exp_avgs"), exp_avg_sqs = tensors("exp_avg_sqs");
  std::vector<Tensor> lefts = tensors("lefts"), rights = tensors("rights");
  std::vector<Tensor> left_bases = tensors("left_bases"), right_bases = tensors("right_bases");
  std::vector<int64_t> refresh = integers("refresh");
};

struct SoapOptions : FromCall {
  using FromCall::FromCall;
  double beta1 = number("beta1"), beta2 = number("beta2");
  double shampoo_beta = number("shampoo_beta");
  double eps = number("eps");
  double weight_decay = number("weight_decay");
  bool correct_bias = flag("correct_bias");
  bool normalize_grads = flag("normalize_grads");
  bool skip_first = flag("skip_first");
  bool permute_squares = flag("permute_squares");
  bool maximize = flag("maximize");
  std::string nonfinite = text("nonfinite");
};

struct DevaOptions : FromCall {
  using FromCall::FromCall;
  double beta1 = number("beta1"), beta2 = number("beta2");
  double shampoo_beta = number("shampoo_beta");
  double eps = number("eps");
  std::string eps_mode = text("eps_mode");
  double weight_decay = number("weight_decay");
  std::string norm = text("norm"), variance = text("variance");
  bool nesterov = flag("nesterov");
  bool sign = flag("sign");
  bool correct_bias = flag("correct_bias");
  bool normalize_grads = flag("normalize_grads");
  std::vector<double> rows = numbers("rows");
  std::vector<double> scales = numbers("scales");
  ScalarType compute_dtype = dtype("compute_dtype");
  bool reference = flag("reference");
  bool maximize = flag("maximize");
  std::string nonfinite = text("nonfinite");

  bool schatten() const { return norm == "schatten"; }
  bool public_schatten() const { return reference && schatten(); }
  // The public classes do not debias their moments.
  bool debias() const { return correct_bias && !reference; }
};

// A step of two records for the dispatcher:
//
//   m.impl("soap_step_", step<BasisLists, SoapOptions, &soap_step_>());
template <class Lists, class Options, void (*kStep)(const Lists&, const Options&)>
void call_step(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  kStep(Lists(op, *stack), Options(op, *stack));
  torch::jit::drop(*stack, op.schema().arguments().size());
}

template <class Lists, class Options, void (*kStep)(const Lists&, const Options&)>
torch::CppFunction step() {
  return torch::CppFunction::makeFromBoxedFunction<&call_step<Lists, Options, kStep>>();
}

}  // namespace spectral_kernels
