#include "rounding.h"

#include <algorithm>
#include <bit>

#include "parallel.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kGrain = 1 << 16;  // elements below which a second thread costs more
constexpr int64_t kRows = 16;       // of a job
constexpr int kPart = 64;           // of a line, rounded at a time
#include "isa/hash.inl"

template <class F>
void by_rows(const Matrix& m, int threads, const F& f) {
  if (double(m.rows) * double(m.cols) < 2 * kGrain) threads = 1;
  parallel_jobs(ceil_div(m.rows, kRows), threads,
                [&](int64_t job) { f(job * kRows, std::min(m.rows, (job + 1) * kRows)); });
}

// Whether lines are columns.
bool by_columns(const Matrix& m) { return m.col_stride != 1 && m.row_stride == 1; }

size_t scratch_of(std::initializer_list<Matrix*> moments) {
  size_t sum = 0;
  for (const Matrix* const m : moments) sum += Widened::bytes({*m});
  return sum;
}

}  // namespace

size_t wide_bytes(const Matrix& narrow) {
  return Workspace::rounded(size_t(narrow.rows * narrow.cols) * sizeof(float));
}

Matrix take_wide(Workspace& workspace, const Matrix& narrow) {
  Matrix wide{
      workspace.take(wide_bytes(narrow)), narrow.rows, narrow.cols, narrow.cols, 1, DType::kF32};
  if (by_columns(narrow)) {
    wide.row_stride = 1;
    wide.col_stride = narrow.rows;
  }
  return wide;
}

void widen(const Matrix& narrow, const Matrix& wide, int threads) {
  const bool swapped = by_columns(narrow);
  const Matrix from = swapped ? narrow.transposed() : narrow;
  const Matrix to = swapped ? wide.transposed() : wide;
  by_rows(from, threads, [&](int64_t r0, int64_t r1) {
    for (int64_t i = r0; i < r1; i++) {
      const uint16_t* const x = static_cast<const uint16_t*>(from.data) + i * from.row_stride;
      uint32_t* const y = static_cast<uint32_t*>(to.data) + i * to.row_stride;
      const int64_t stride = from.col_stride;
      if (stride == 1) {  // a loop of vectors
        for (int64_t j = 0; j < from.cols; j++) y[j] = uint32_t(x[j]) << 16;
      } else {
        for (int64_t j = 0; j < from.cols; j++) y[j] = uint32_t(x[j * stride]) << 16;
      }
    }
  });
}

void round_at_random(const Matrix& wide, uint64_t step, const Matrix& narrow, int threads) {
  const bool swapped = by_columns(narrow);
  const Matrix from = swapped ? wide.transposed() : wide;
  const Matrix to = swapped ? narrow.transposed() : narrow;
  const auto round_line = kernels().round_line;
  by_rows(from, threads, [&](int64_t r0, int64_t r1) {
    uint16_t part[kPart];
    for (int64_t i = r0; i < r1; i++) {
      const uint32_t* const x = static_cast<const uint32_t*>(from.data) + i * from.row_stride;
      uint16_t* const y = static_cast<uint16_t*>(to.data) + i * to.row_stride;
      if (!swapped && to.col_stride == 1) {
        round_line(x, seed_of(step, uint64_t(i)), 0, from.cols, y);
        continue;
      }
      for (int64_t j0 = 0; j0 < from.cols; j0 += kPart) {
        const int64_t count = std::min<int64_t>(kPart, from.cols - j0);
        if (swapped) {
          for (int64_t j = 0; j < count; j++)
            part[j] = rounded(x[j0 + j], seed_of(step, uint64_t(j0 + j)), uint32_t(i));
        } else {
          round_line(x + j0, seed_of(step, uint64_t(i)), uint32_t(j0), count, part);
        }
        for (int64_t j = 0; j < count; j++) y[(j0 + j) * to.col_stride] = part[j];
      }
    }
  });
}

size_t Widened::bytes(std::initializer_list<Matrix> moments) {
  size_t sum = 0;
  for (const Matrix& m : moments)
    if (m && m.dtype == DType::kBF16) sum += wide_bytes(m);
  return sum;
}

Widened::Widened(std::initializer_list<Matrix*> moments, int threads)
    : workspace_(scratch_of(moments)), threads_(threads) {
  for (Matrix* const m : moments) {
    if (!*m || m->dtype != DType::kBF16) continue;
    copies_.push_back({*m, take_wide(workspace_, *m)});
    widen(*m, copies_.back().wide, threads);
    *m = copies_.back().wide;
  }
}

void Widened::round_back(double count) const {
  for (const Copy& copy : copies_)
    round_at_random(copy.wide, uint64_t(count), copy.narrow, threads_);
}

}  // namespace spectral_kernels::cpu
