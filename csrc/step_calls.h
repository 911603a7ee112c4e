// Calls of the list steps as records: their lists, and their options as _options.py has them. Both
// are read from torch's stack by the names of the schema in ops.cpp, so that a new option
// is a line there, a line here, and what the backends make of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "boxing.h"

namespace spectral_kernels {

// Reads arguments by name while a record is made.
class FromCall {
 public:
  explicit FromCall(CallArguments& call) : call_(&call) {}

 protected:
  std::vector<Tensor> tensors(const char* name) { return take<std::vector<Tensor>>(name); }
  Tensor tensor(const char* name) { return take<Tensor>(name); }
  double number(const char* name) { return take<double>(name); }
  std::optional<double> number_or_none(const char* name) {
    return take<std::optional<double>>(name);
  }
  std::vector<double> numbers(const char* name) { return take<std::vector<double>>(name); }
  int64_t integer(const char* name) { return take<int64_t>(name); }
  std::vector<int64_t> integers(const char* name) { return take<std::vector<int64_t>>(name); }
  bool flag(const char* name) { return take<bool>(name); }
  std::string text(const char* name) { return take<std::string>(name); }
  ScalarType dtype(const char* name) { return take<ScalarType>(name); }

 private:
  template <class T>
  T take(const char* name) {
    return call_->take_named<T>(name);
  }

  CallArguments* call_;  // not used once the record is made
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
  static constexpr const char* kOperator = "muon_step_";

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
  static constexpr const char* kOperator = "shampoo_step_";

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
  // Entries whose bases are known not to be zeros, by the second bit of theirs in `refresh`.
  std::vector<bool> started = second_bits(refresh);

 private:
  static std::vector<bool> second_bits(std::vector<int64_t>& flags) {
    std::vector<bool> bits;
    for (int64_t& flag : flags) {
      bits.push_back((flag & 2) != 0);
      flag &= 1;
    }
    return bits;
  }
};

struct SoapOptions : FromCall {
  static constexpr const char* kOperator = "soap_step_";

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
  static constexpr const char* kOperator = "deva_step_";

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

// A step of two records as torch calls it:
//
//   m.impl("soap_step_", &boxed_step<BasisLists, SoapOptions, &soap_step_>);
template <class Lists, class Options, void (*kStep)(const Lists&, const Options&)>
void boxed_step(Value* stack, uint64_t, uint64_t) {
  CallArguments call(schema_of(Options::kOperator), stack);
  const Lists lists(call);
  const Options options(call);
  call.check_all_taken();
  kStep(lists, options);
}

}  // namespace spectral_kernels
