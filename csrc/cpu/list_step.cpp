#include "list_step.h"

#include <cmath>

#include "parallel.h"

namespace spectral_kernels::cpu {
namespace {

template <class F>
void with_count(const at::Tensor& t, int64_t index, const F& f) {
  const int64_t at = t.numel() == 1 ? 0 : index;
  const at::Tensor flat = t.view({-1});
  switch (t.scalar_type()) {
    case at::kFloat:
      f(flat.data_ptr<float>()[at]);
      break;
    case at::kDouble:
      f(flat.data_ptr<double>()[at]);
      break;
    case at::kLong:
      f(flat.data_ptr<int64_t>()[at]);
      break;
    default:
      TORCH_CHECK_TYPE(false, "step counts must be float32, float64 or int64, got ",
                       t.scalar_type());
  }
}

}  // namespace

void raise_nonfinite(const std::vector<Item>& items,
                     std::initializer_list<std::pair<const char*, at::TensorList>> lists) {
  for (const auto& [name, list] : lists)
    for (const Item& item : items)
      TORCH_CHECK_VALUE(!std::isnan(max_abs(MatrixBatch(list[size_t(item.entry)])[item.index],
                                            available_threads())),
                        name, "[", item.entry, "] has a non-finite element (matrix ", item.index,
                        ")");
}

double scalar(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return double(*t.const_data_ptr<float>());
    case at::kDouble:
      return *t.const_data_ptr<double>();
    default:
      TORCH_CHECK_TYPE(false, "lr must be float32 or float64, got ", t.scalar_type());
  }
}

Progress::Progress(at::TensorList step_counts, const at::Tensor& skipped)
    : counts_(step_counts), skipped_(skipped), updated_(step_counts.size()) {}

double Progress::step(const Item& item) const {
  double value = 0;
  with_count(counts_[size_t(item.entry)], item.index, [&](auto& count) { value = double(count); });
  return value;
}

void Progress::updated(const Item& item) {
  const at::Tensor& count = counts_[size_t(item.entry)];
  updated_[size_t(item.entry)].store(true, std::memory_order_relaxed);
  if (count.numel() > 1) with_count(count, item.index, [](auto& value) { value += 1; });
}

void Progress::finish() {
  for (size_t e = 0; e < counts_.size(); e++)
    if (counts_[e].numel() == 1 && updated_[e].load())
      with_count(counts_[e], 0, [](auto& value) { value += 1; });
  *skipped_.data_ptr<int64_t>() += skips_.load();
}

}  // namespace spectral_kernels::cpu
