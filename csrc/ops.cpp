// Every operator of the library: its schema and what its arguments mean beyond the public
// docstrings. Implementations register themselves: csrc/cpu at the foot of a family's file,
// csrc/cuda in a family's operators.cpp; fakes stand in python/spectral_kernels/_operators.py, and
// what refuses to be differentiated in _fake.py.
//
// Conventions
//   - Leading dimensions are a batch; any strides; empty sizes are no-ops.
//   - A size-0 tensor stands for an absent side or state (an optional list element would not pass
//     torch.library.opcheck).
//   - List steps: entry i of every list belongs to one parameter (or block): 2-D, or batched.
//     step_counts[i] is 0-dim, or has the batch's shape; a skipped matrix does not advance it
//     (0-dim: it advances if any matrix of the entry was updated). `skipped` is an int64 counter of
//     skipped matrices.
//   - Coefficient rows are flat: a0, b0, c0, a1, b1, c1, ... The restarts of a list are flat too:
//     entry i has those from restart_ends[i - 1] up to restart_ends[i]; no ends, no restarts.
//   - nonfinite is "skip", "propagate" or "raise".
#include <cctype>
#include <functional>
#include <map>
#include <stdexcept>

#include "registration.h"

namespace spectral_kernels {
namespace {

struct Library {
  std::function<void(const char* schema)> def;
};

void define_all(const Library& m) {
  // symmetric_matmul
  m.def("gram(Tensor x) -> Tensor");

  // newton_schulz
  m.def(
      "newton_schulz(Tensor x, float[] rows, *, str method, int[] restarts, "
      "ScalarType compute_dtype, float eps, str norm, float norm_factor) -> Tensor");
  m.def("polar(Tensor x) -> Tensor");
  m.def(
      "muon_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] second_moments, Tensor(d!)[] step_counts, Tensor(e!) skipped, Tensor lr, *, "
      "float momentum, bool nesterov, float? beta2, float neuron_eps, float weight_decay, "
      "bool cautious, bool hyperball, float[] rows, float[] scales, str method, int[] restarts, "
      "int[] restart_ends, ScalarType compute_dtype, float eps, str norm, float norm_factor, "
      "bool maximize, str nonfinite) -> ()");

  // kron_factor
  m.def(
      "kron_factors_update_(Tensor(a!) left, Tensor(b!) right, Tensor grad, Tensor(c!) skipped, *, "
      "float beta, float weight, Tensor left_root, Tensor right_root) -> ()");
  m.def("kron_precondition(Tensor grad, Tensor left, Tensor right) -> Tensor");

  // inverse_root
  m.def(
      "inverse_root(Tensor a, int p, *, float ridge, float relative_ridge, str method) "
      "-> (Tensor root, Tensor status, Tensor steps, Tensor residual, Tensor delta)");
  m.def(
      "shampoo_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] lefts, Tensor(d!)[] rights, Tensor(e!)[] left_roots, Tensor(f!)[] right_roots, "
      "Tensor(g!)[] graft_squares, Tensor(h!)[] root_failures, Tensor(i!)[] step_counts, "
      "Tensor(j!) skipped, Tensor lr, *, float beta1, float beta2, float graft_beta2, int root, "
      "float ridge, float relative_ridge, str root_method, float weight_decay, str graft, "
      "float graft_eps, str graft_eps_mode, bool kl, str kl_order, bool debias, bool maximize, "
      "str nonfinite, int[] refresh) -> ()");

  // eigenbasis
  m.def("eigenbasis(Tensor a) -> (Tensor values, Tensor vectors)");
  m.def("refresh_eigenbasis(Tensor q, Tensor a, *, bool sort) -> (Tensor values, Tensor vectors)");
  m.def(
      "soap_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] lefts, Tensor(e!)[] rights, Tensor(f!)[] left_bases, "
      "Tensor(g!)[] right_bases, Tensor(h!)[] step_counts, Tensor(i!) skipped, Tensor lr, *, "
      "float beta1, float beta2, float shampoo_beta, float eps, float weight_decay, "
      "bool correct_bias, bool normalize_grads, bool skip_first, bool permute_squares, "
      "bool maximize, str nonfinite, int[] refresh) -> ()");

  // deva
  m.def(
      "deva_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] lefts, Tensor(e!)[] rights, Tensor(f!)[] left_bases, "
      "Tensor(g!)[] right_bases, Tensor(h!)[] step_counts, Tensor(i!) skipped, Tensor lr, *, "
      "float beta1, float beta2, float shampoo_beta, float eps, str eps_mode, float weight_decay, "
      "str norm, str variance, bool nesterov, bool sign, bool correct_bias, bool normalize_grads, "
      "float[] rows, float[] scales, ScalarType compute_dtype, bool reference, bool maximize, "
      "str nonfinite, int[] refresh) -> ()");
}

// "gram" and {"x"} of "gram(Tensor x) -> Tensor".
Schema parsed(const std::string& text) {
  const size_t open = text.find('('), close = text.rfind(") ->");
  Schema schema{text.substr(0, open), {}};
  for (size_t begin = open + 1; begin < close;) {
    const size_t end = std::min(text.find(',', begin), close);
    const std::string argument = text.substr(begin, end - begin);
    const size_t name = argument.rfind(' ');
    if (argument != "*" && argument != " *") schema.arguments.push_back(argument.substr(name + 1));
    begin = end + 1;
  }
  return schema;
}

}  // namespace

const Schema& schema_of(const std::string& name) {
  static const auto all = [] {
    std::map<std::string, Schema> schemas;
    define_all({[&](const char* text) {
      const Schema schema = parsed(text);
      schemas.emplace(schema.name, schema);
    }});
    return schemas;
  }();
  return all.at(name);
}

#ifdef SPECTRAL_KERNELS_EMULATION
STABLE_TORCH_LIBRARY(spectral_kernels_emulated, library) {
#else
STABLE_TORCH_LIBRARY(spectral_kernels, library) {
#endif
  define_all({[&](const char* schema) { library.def(schema); }});
}

}  // namespace spectral_kernels
