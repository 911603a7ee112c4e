#include "list_step.h"

#include <cmath>
#include <cstring>

#include "parallel.h"

namespace spectral_kernels::cpu {
namespace {

template <class F>
void with_count(const Tensor& t, int64_t index, const F& f) {
  const int64_t at = t.numel() == 1 ? 0 : index;
  switch (t.scalar_type()) {
    case kFloat:
      f(t.data_ptr<float>()[at]);
      break;
    case kDouble:
      f(t.data_ptr<double>()[at]);
      break;
    case kLong:
      f(t.data_ptr<int64_t>()[at]);
      break;
    default:
      CHECK_TYPE(false, "step counts must be float32, float64 or int64, got ", t.scalar_type());
  }
}

size_t saved_bytes(const Matrix& m) {
  return Workspace::rounded(size_t(m.rows * m.cols) * element_size(m.dtype));
}

size_t total_bytes(std::initializer_list<Matrix> matrices) {
  size_t sum = 0;
  for (const Matrix& m : matrices)
    if (m) sum += saved_bytes(m);
  return sum;
}

// Copies between a matrix and dense memory, along whichever dimension is contiguous.
template <class F>
void for_each_line(const Matrix& given, char* dense, const F& f) {
  const Matrix m = given.row_stride == 1 && given.col_stride != 1 ? given.transposed() : given;
  const int64_t size = int64_t(element_size(m.dtype));
  char* const data = static_cast<char*>(m.data);
  for (int64_t i = 0; i < m.rows; i++) {
    char* const line = data + i * m.row_stride * size;
    if (m.col_stride == 1) {
      f(line, dense, size_t(m.cols * size));
      dense += m.cols * size;
      continue;
    }
    for (int64_t j = 0; j < m.cols; j++, dense += size)
      f(line + j * m.col_stride * size, dense, size_t(size));
  }
}

}  // namespace

Undo::Undo(std::initializer_list<Matrix> matrices, bool on)
    : workspace_(on ? total_bytes(matrices) : 0) {
  if (!on) return;
  copies_.reserve(matrices.size());
  for (const Matrix& m : matrices) {
    if (!m) continue;
    copies_.push_back({m, static_cast<char*>(workspace_.take(saved_bytes(m)))});
    for_each_line(m, copies_.back().saved, [](const char* line, char* dense, size_t size) {
      std::memcpy(dense, line, size);
    });
  }
}

Undo::~Undo() {
  for (const Copy& copy : copies_)
    for_each_line(copy.matrix, copy.saved, [](char* line, const char* dense, size_t size) {
      std::memcpy(line, dense, size);
    });
}

size_t Undo::bytes(std::initializer_list<Matrix> matrices) {
  return Workspace::rounded(total_bytes(matrices));
}

bool all_finite(std::initializer_list<Matrix> matrices, int threads) {
  for (const Matrix& m : matrices)
    if (m && std::isnan(max_abs(m, threads))) return false;
  return true;
}

void raise_nonfinite(const std::vector<Item>& items,
                     std::initializer_list<std::pair<const char*, TensorList>> lists) {
  for (const auto& [name, list] : lists)
    for (const Item& item : items) {
      if (list[size_t(item.entry)].numel() == 0) continue;
      CHECK_VALUE(!std::isnan(max_abs(MatrixBatch(list[size_t(item.entry)])[item.index],
                                      available_threads())),
                  name, "[", item.entry, "] has a non-finite element (matrix ", item.index, ")");
    }
}

double scalar(const Tensor& t) {
  switch (t.scalar_type()) {
    case kFloat:
      return double(*t.const_data_ptr<float>());
    case kDouble:
      return *t.const_data_ptr<double>();
    default:
      CHECK_TYPE(false, "lr must be float32 or float64, got ", t.scalar_type());
  }
}

Progress::Progress(TensorList step_counts, const Tensor& skipped)
    : counts_(step_counts), skipped_(skipped), updated_(step_counts.size()) {}

double Progress::step(const Item& item) const {
  double value = 0;
  with_count(counts_[size_t(item.entry)], item.index, [&](auto& count) { value = double(count); });
  return value;
}

void Progress::updated(const Item& item) {
  const Tensor& count = counts_[size_t(item.entry)];
  updated_[size_t(item.entry)].store(true, std::memory_order_relaxed);
  if (count.numel() > 1) with_count(count, item.index, [](auto& value) { value += 1; });
}

Progress::~Progress() {
  for (size_t e = 0; e < counts_.size(); e++)
    if (counts_[e].numel() == 1 && updated_[e].load())
      with_count(counts_[e], 0, [](auto& value) { value += 1; });
  *skipped_.data_ptr<int64_t>() += skips_.load();
}

}  // namespace spectral_kernels::cpu
