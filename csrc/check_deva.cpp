#include "check_deva.h"

#include "check_lists.h"

namespace spectral_kernels {
namespace {

void check_squares(TensorList squares, TensorList params, Variance variance, bool narrow) {
  if (variance == Variance::kNone) return check_list(squares, "exp_avg_sqs", params.size());
  if (variance != Variance::kLowMemory)
    return narrow ? check_moment(squares, "exp_avg_sqs", params)
                  : check_state(squares, "exp_avg_sqs", params, false);
  check_list(squares, "exp_avg_sqs", params.size());
  for (size_t i = 0; i < params.size(); i++) {
    auto expected = params[i].sizes().vec();
    expected.pop_back();
    expected.back() = params[i].size(-2) + params[i].size(-1);
    CHECK_VALUE(squares[i].sizes() == expected, "exp_avg_sqs[", i, "] must have shape ",
                IntArrayRef(expected), " for low_memory, got ", squares[i].sizes());
    CHECK_TYPE(squares[i].scalar_type() == kFloat || squares[i].scalar_type() == kDouble,
               "exp_avg_sqs must be float32 or float64, got ", squares[i].scalar_type());
    check_writable(squares[i], "exp_avg_sqs");
  }
}

Variance variance_of(const std::string& name) {
  check_one_of(name, "variance", {"momentum", "gradient", "instant", "low_memory", "none"});
  if (name == "momentum") return Variance::kMomentum;
  if (name == "gradient") return Variance::kGradient;
  if (name == "instant") return Variance::kInstant;
  return name == "low_memory" ? Variance::kLowMemory : Variance::kNone;
}

}  // namespace

Variance check_deva(const BasisLists& lists, const DevaOptions& options, bool narrow) {
  const std::string &norm = options.norm, &eps_mode = options.eps_mode;
  check_one_of(eps_mode, "eps_mode", {"relative", "outside", "inside"});
  check_one_of(norm, "norm", {"schatten", "linf"});
  const Variance kind = variance_of(options.variance);
  check_squares(lists.exp_avg_sqs, lists.params, kind, narrow);
  const std::vector<double>& scales = options.scales;
  CHECK_VALUE(scales.size() == lists.params.size(), "scales has ", scales.size(),
              " entries, params has ", lists.params.size());
  CHECK_VALUE(norm != "linf" || kind != Variance::kLowMemory,
              "variance='low_memory' keeps row and column sums, which norm='linf' lacks");
  CHECK_VALUE(!options.reference || eps_mode == "inside",
              "reference=True has its eps inside the root, not eps_mode='", eps_mode, "'");
  CHECK_VALUE(!options.reference || kind == Variance::kMomentum ||
                  (kind == Variance::kInstant && norm == "schatten"),
              "reference=True with norm='", norm, "' does not have variance='", options.variance,
              "'");
  return kind;
}

}  // namespace spectral_kernels
