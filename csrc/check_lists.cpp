#include "check_lists.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace spectral_kernels {
namespace {

int64_t batch_of(const Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 0; d + 2 < t.dim(); d++) count *= t.size(d);
  return count;
}

void check_device(const Tensor& t, const char* name, size_t i, TensorList params) {
  CHECK_VALUE(t.device() == params[0].device(), name, "[", i, "] is on ", t.device(),
              ", the other tensors are on ", params[0].device());
}

// The value of a rate on a device is not waited for.
void check_rate(const Tensor& lr) {
  CHECK_VALUE(lr.numel() == 1, "lr must be one number, got shape ", lr.sizes());
  CHECK_TYPE(lr.scalar_type() == kFloat || lr.scalar_type() == kDouble,
             "lr must be float32 or float64, got ", lr.scalar_type());
  if (!lr.is_cpu()) return;
  const double value = lr.scalar_type() == kFloat ? double(*lr.const_data_ptr<float>())
                                                  : *lr.const_data_ptr<double>();
  CHECK_VALUE(value >= 0 && std::isfinite(value), "lr must be in [0, inf), got ", value);
}

// Whether the elements fill one stretch of memory, each at a place of its own.
bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) > 1) steps.emplace_back(t.stride(d), t.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t next = 1;
  for (const auto& [step, size] : steps) {
    if (step != next) return false;
    next *= size;
  }
  return true;
}

}  // namespace

void check_step(const StepLists& lists) {
  check_list(lists.grads, "grads", lists.params.size());
  check_list(lists.step_counts, "step_counts", lists.params.size());
  for (size_t i = 0; i < lists.params.size(); i++) {
    check_matrix(lists.params[i], "params");
    check_device(lists.params[i], "params", i, lists.params);
    check_device(lists.grads[i], "grads", i, lists.params);
    check_matrix(lists.grads[i], "grads");
    check_writable(lists.params[i], "params");
    check_same_shape(lists.params[i], "params", lists.grads[i], "grads");
    const Tensor& count = lists.step_counts[i];
    CHECK_TYPE(count.scalar_type() == kFloat || count.scalar_type() == kDouble ||
                   count.scalar_type() == kLong,
               "step_counts must be float32, float64 or int64, got ", count.scalar_type());
    CHECK_VALUE(
        count.is_contiguous() && (count.numel() == 1 || count.numel() == batch_of(lists.params[i])),
        "step_counts[", i, "] must have one element or one for each of the ",
        batch_of(lists.params[i]), " matrices, got shape ", count.sizes());
    check_device(count, "step_counts", i, lists.params);
  }
  CHECK_TYPE(lists.skipped.scalar_type() == kLong && lists.skipped.numel() == 1,
             "skipped must be one int64, got ", lists.skipped.scalar_type(), " of shape ",
             lists.skipped.sizes());
  check_rate(lists.lr);
  if (lists.params.empty()) return;
  CHECK_VALUE(lists.skipped.device() == lists.params[0].device(), "skipped is on ",
              lists.skipped.device(), ", the other tensors are on ", lists.params[0].device());
  CHECK_VALUE(lists.lr.is_cpu() || lists.lr.device() == lists.params[0].device(), "lr is on ",
              lists.lr.device(), ", the other tensors are on ", lists.params[0].device());
}

void check_state(TensorList state, const char* name, TensorList params, bool optional) {
  check_list(state, name, params.size());
  for (size_t i = 0; i < params.size(); i++) {
    if (optional && state[i].numel() == 0) continue;
    check_device(state[i], name, i, params);
    check_full_precision(state[i], name);
    check_same_shape(params[i], "params", state[i], name);
    check_writable(state[i], name);
  }
}

void check_moment(TensorList state, const char* name, TensorList params) {
  check_list(state, name, params.size());
  for (size_t i = 0; i < params.size(); i++) {
    if (state[i].scalar_type() != kBFloat16) {
      check_state(state.slice(i, 1), name, params.slice(i, 1), false);
      continue;
    }
    check_matrix(state[i], name);
    CHECK_TYPE(params[i].scalar_type() != kDouble, name, "[", i,
               "] is bfloat16 of a parameter that is float64");
    check_device(state[i], name, i, params);
    check_same_shape(params[i], "params", state[i], name);
    check_writable(state[i], name);
  }
}

void check_rows_state(TensorList state, const char* name, TensorList params, bool present) {
  check_list(state, name, params.size());
  for (size_t i = 0; i < params.size(); i++) {
    if (params[i].numel() == 0) continue;
    auto expected = params[i].sizes().vec();
    expected.back() = 1;
    CHECK_VALUE(present ? state[i].sizes() == expected : state[i].numel() == 0, name, "[", i,
                "] must have ", present ? "shape " : "no element: ",
                present ? text_of(IntArrayRef(expected)) : "there is no beta2", ", got ",
                state[i].sizes());
    if (!present) continue;
    check_device(state[i], name, i, params);
    check_full_precision(state[i], name);
    CHECK_TYPE((state[i].scalar_type() == kDouble) == (params[i].scalar_type() == kDouble), name,
               "[", i, "] is ", state[i].scalar_type(), " of a parameter that is ",
               params[i].scalar_type());
    check_writable(state[i], name);
  }
}

void check_factors(TensorList factors, const char* name, TensorList params, int side) {
  check_list(factors, name, params.size());
  for (size_t i = 0; i < params.size(); i++) {
    if (factors[i].numel() == 0) continue;
    check_device(factors[i], name, i, params);
    check_full_precision(factors[i], name);
    check_writable(factors[i], name);
    auto expected = params[i].sizes().vec();
    const int64_t n = side == 0 ? params[i].size(-2) : params[i].size(-1);
    expected[expected.size() - 1] = expected[expected.size() - 2] = n;
    CHECK_VALUE(factors[i].sizes() == expected, name, "[", i, "] must have shape ",
                IntArrayRef(expected), " or no element, got ", factors[i].sizes());
  }
}

void check_partners(TensorList factors, const char* name, TensorList partners,
                    const char* partner) {
  for (size_t i = 0; i < factors.size(); i++)
    CHECK_VALUE((factors[i].numel() == 0) == (partners[i].numel() == 0), name, "[", i,
                "] has shape ", factors[i].sizes(), ", ", partner, "[", i, "] ",
                partners[i].sizes());
}

void check_eigenbasis_lists(const BasisLists& lists) {
  const TensorList params = lists.params;
  check_factors(lists.lefts, "lefts", params, 0);
  check_factors(lists.rights, "rights", params, 1);
  check_factors(lists.left_bases, "left_bases", params, 0);
  check_factors(lists.right_bases, "right_bases", params, 1);
  check_partners(lists.lefts, "lefts", lists.left_bases, "left_bases");
  check_partners(lists.rights, "rights", lists.right_bases, "right_bases");
  CHECK_VALUE(lists.refresh.size() == params.size(), "refresh has ", lists.refresh.size(),
              " entries, params has ", params.size());
}

void check_distinct(std::initializer_list<TensorList> written, TensorList read) {
  struct Span {
    uintptr_t begin, end;
    const Tensor* tensor;
    bool written;
  };
  std::vector<Span> spans;
  const auto add = [&](const Tensor& t, bool is_written) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    spans.push_back({begin, begin + uintptr_t(last + 1) * t.element_size(), &t, is_written});
  };
  for (const TensorList& list : written)
    for (const Tensor& t : list) add(t, true);
  for (const Tensor& t : read) add(t, false);
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < spans.size(); i++) {
    for (size_t j = i + 1; j < spans.size() && spans[j].begin < spans[i].end; j++) {
      if (!spans[i].written && !spans[j].written) continue;
      // Slices of one tensor may interleave without sharing an element, which torch leaves open.
      // Only between dense tensors is that known.
      CHECK_VALUE(spans[i].begin != spans[j].begin &&
                      !(is_dense(*spans[i].tensor) && is_dense(*spans[j].tensor)),
                  "tensors of shapes ", spans[i].tensor->sizes(), " and ", spans[j].tensor->sizes(),
                  " overlap in memory, or are the same, and one of them is written");
    }
  }
}

void check_eigenbasis_distinct(const BasisLists& lists, bool squares) {
  check_distinct(
      {lists.params, lists.exp_avgs, squares ? TensorList(lists.exp_avg_sqs) : TensorList(),
       lists.lefts, lists.rights, lists.left_bases, lists.right_bases},
      lists.grads);
}

void check_restart_ends(IntArrayRef restarts, IntArrayRef ends, size_t entries) {
  bool rising = ends.empty() || (ends.size() == entries && ends.back() == int64_t(restarts.size()));
  for (size_t i = 0; rising && i < ends.size(); i++) rising = ends[i] >= (i == 0 ? 0 : ends[i - 1]);
  CHECK_VALUE(rising, "restart_ends must rise to ", restarts.size(), " in ", entries,
              " entries, or be empty, got ", ends);
}

}  // namespace spectral_kernels
