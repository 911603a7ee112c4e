#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "parallel.h"
#include "with_type.h"

namespace spectral_kernels::cpu {
namespace {

constexpr size_t kPage = 4096;

// The scratch memory of this thread for a job of `edge` blocks, kept from its first product on;
// null if there is no memory.
void* scratch_of_thread(const Jobs& jobs) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> buffer;
  static thread_local size_t size = 0;
  const size_t bytes = jobs.scratch_bytes(jobs.edge);
  if (size < bytes && !workspace_fails()) {
    buffer.reset();
    buffer.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    size = buffer ? bytes : 0;
  }
  return size < bytes ? nullptr : buffer.get();
}

// A product in the middle of a list step must not fail: without memory it goes block by block and
// takes the stack.
constexpr size_t kStackBytes = 80 << 10;

template <class F>
__attribute__((noinline)) void with_stack_buffer(const F& f) {
  alignas(4096) char buffer[kStackBytes];
  f(static_cast<void*>(buffer));
}

struct Job {
  int64_t i, j;
  double cost;
};

std::vector<Job> jobs_of(const Product& p, const Jobs& jobs, int64_t m, int64_t n, int64_t edge) {
  std::vector<Job> list;
  for (int64_t i = 0; i < m; i += edge)
    for (int64_t j = 0; j < (p.symmetric ? i + 1 : n); j += edge) {
      const double rows = double(std::min(edge, m - i)), cols = double(std::min(edge, n - j));
      const double area = p.symmetric && i == j ? rows * (rows + 1) / 2 : rows * cols;
      list.push_back({i, j, area + jobs.row_cost * rows + jobs.col_cost * cols});
    }
  std::stable_sort(list.begin(), list.end(),
                   [](const Job& a, const Job& b) { return a.cost > b.cost; });
  return list;
}

// When the last of the jobs (the dearest first) is done if each takes the first free thread. A
// thread that comes late, or is interrupted, keeps the others waiting for a part of its job.
double end_of(const std::vector<Job>& list, int threads, double late) {
  std::vector<double> busy(size_t(threads), 0.0);
  for (const Job& job : list) *std::min_element(busy.begin(), busy.end()) += job.cost;
  return *std::max_element(busy.begin(), busy.end()) + late * list.front().cost;
}

// For several threads: such jobs as bring the end nearest, and their edge.
std::vector<Job> jobs_of(const Product& p, const Jobs& jobs, int64_t m, int64_t n, int threads,
                         int64_t& edge) {
  constexpr size_t kEnough = 32;  // jobs a thread
  edge = jobs.edge;
  std::vector<Job> best = jobs_of(p, jobs, m, n, edge);
  double end = end_of(best, threads, jobs.late);
  for (int64_t e = jobs.edge - 1; e >= 1; e--) {
    std::vector<Job> list = jobs_of(p, jobs, m, n, e);
    if (list.size() > kEnough * size_t(threads)) break;
    const double time = end_of(list, threads, jobs.late);
    if (time >= end) continue;
    end = time;
    edge = e;
    best = std::move(list);
  }
  return best;
}

// Blocks [i0, i1) x [j0, j1) on this thread.
void multiply(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Kernels& k = kernels();
  const int kind = int(p.a.kind);
  if (void* const scratch = scratch_of_thread(k.jobs[kind]))
    return k.product[kind](p, i0, i1, j0, j1, scratch);
  with_stack_buffer([&](void* scratch) {
    for (int64_t i = i0; i < i1; i++)
      for (int64_t j = j0; j < (p.symmetric ? std::min(i + 1, j1) : j1); j++)
        k.product[kind](p, i, i + 1, j, j + 1, scratch);
  });
}

constexpr double kPackGrain = 1 << 14;  // elements a thread

}  // namespace

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
    case DType::kBF16:
    case DType::kF16:
      return 2;
  }
  return 0;
}

namespace {

int64_t words_of_panel(int64_t rows, Kind kind) {
  return (kind == Kind::kBF16 ? ceil_div(rows, 2) : rows) * kernels().panel[int(kind)];
}

// Bytes of the panels [0] and of the left image [1].
std::pair<size_t, size_t> bytes_of(int64_t rows, int64_t cols, Kind kind, Held held) {
  const int64_t P = kernels().panel[int(kind)], panels = ceil_div(cols, P);
  const size_t word = kind == Kind::kF64 ? 8 : 4;
  const size_t image =
      Workspace::rounded(size_t(ceil_div(rows, P) * panels * kernels().image_words[int(kind)]) * 4);
  const size_t data = Workspace::rounded(size_t(panels * words_of_panel(rows, kind)) * word);
  return {held == Held::kLeftOnly && image > 0 ? 0 : data, held == Held::kPanels ? 0 : image};
}

}  // namespace

size_t panel_bytes(int64_t rows, int64_t cols, Kind kind, Held held) {
  const auto [data, image] = bytes_of(rows, cols, kind, held);
  return data + image;
}

Panels panels_at(void* data, int64_t rows, int64_t cols, Kind kind) {
  return {data, rows, cols, kind, words_of_panel(rows, kind)};
}

Panels take_panels(Workspace& workspace, int64_t rows, int64_t cols, Kind kind, Held held) {
  const auto [data, image] = bytes_of(rows, cols, kind, held);
  Panels p = panels_at(nullptr, rows, cols, kind);
  if (data > 0) p.data = workspace.take(data);
  if (image > 0) p.left = workspace.take(image);
  return p;
}

Product multiply(const Panels& a, const Panels& b) { return multiply(a, {}, b); }

Product multiply(const Panels& a, const Panels& a_t, const Panels& b) {
  Product p;
  p.a = a;
  p.a_t = a_t;
  p.b = b;
  return p;
}

void run(const Product& p, int threads) {
  const Kernels& k = kernels();
  const int kind = int(p.a.kind);
  const int64_t P = k.panel[kind], m = ceil_div(p.a.cols, P), n = ceil_div(p.b.cols, P);
  if (m == 0 || n == 0) return;
  const double work =
      double(p.a.cols) * double(p.b.cols) * double(p.a.rows) / (p.symmetric ? 2 : 1);
  if (work < 2 * kThreadGrain) threads = 1;
  threads = std::min(threads, available_threads());
  const Jobs& jobs = k.jobs[kind];
  int64_t edge = jobs.edge;
  if (threads <= 1) {
    for (int64_t i = 0; i < m; i += edge)
      for (int64_t j = 0; j < (p.symmetric ? i + 1 : n); j += edge)
        multiply(p, i, std::min(i + edge, m), j, std::min(j + edge, n));
    return;
  }
  const std::vector<Job> list = jobs_of(p, jobs, m, n, threads, edge);
  parallel_jobs(int64_t(list.size()), threads, [&](int64_t t) {
    const Job& job = list[size_t(t)];
    multiply(p, job.i, std::min(job.i + edge, m), job.j, std::min(job.j + edge, n));
  });
}

void run(const InPlace& p, int threads) {
  constexpr int64_t kRows = 32;  // a job
  const auto kernel = kernels().multiply_in_place[p.c.dtype == DType::kF64 ? 1 : 0];
  if (double(p.c.rows) * double(p.c.cols) * double(p.a.cols) < 2 * kThreadGrain) threads = 1;
  if (threads <= 1) return kernel(p, 0, p.c.rows);
  parallel_jobs(ceil_div(p.c.rows, kRows), threads,
                [&](int64_t i) { kernel(p, i * kRows, std::min((i + 1) * kRows, p.c.rows)); });
}

void run(const Pack& p, int threads) {
  const Kernels& k = kernels();
  const int kind = int((p.out ? p.out : p.out_t).kind);
  const int64_t blocks = ceil_div(p.x.rows, k.panel[kind]);
  if (double(p.x.rows) * double(p.x.cols) < 2 * kPackGrain) threads = 1;
  if (threads <= 1) {
    k.pack[kind](p, 0, blocks);
    return;
  }
  parallel_jobs(blocks, threads, [&](int64_t i) { k.pack[kind](p, i, i + 1); });
}

void run(const Combine& p, int threads) {
  const Kernels& k = kernels();
  const Panels& shape = p.a ? p.a : p.out;
  const auto kernel = k.combine[shape.kind == Kind::kF64 ? 1 : 0];
  const int64_t blocks = ceil_div(shape.cols, k.panel[int(shape.kind)]);
  if (double(shape.rows) * double(shape.cols) < 2 * kPackGrain) threads = 1;
  parallel_jobs(blocks, threads, [&](int64_t j) { kernel(p, j, j + 1); });
}

void run(const Scale& p, int threads) {
  const Kernels& k = kernels();
  const auto kernel = k.scale[p.x.kind == Kind::kF64 ? 1 : 0];
  const int64_t blocks = ceil_div(p.x.cols, k.panel[int(p.x.kind)]);
  if (double(p.x.rows) * double(p.x.cols) < 2 * kPackGrain) threads = 1;
  parallel_jobs(blocks, threads, [&](int64_t j) { kernel(p, j, j + 1); });
}

void scale_columns(const Panels& x, const Panels& x_t, const double* by, int threads) {
  Scale columns, rows;
  columns.x = columns.out = x;
  columns.col = by;
  run(columns, threads);
  rows.x = rows.out = x_t;
  rows.row = by;
  run(rows, threads);
}

int64_t row_blocks(int64_t m, Kind kind) { return ceil_div(m, kernels().panel[int(kind)]); }

namespace {

// Block rows of an elementwise kernel side by side.
template <class Work>
void run_rows(void (*kernel)(const Work&, int64_t, int64_t), const Work& work, int64_t blocks,
              double elements, int threads) {
  if (elements < 2 * kPackGrain) threads = 1;
  parallel_jobs(blocks, threads, [&](int64_t i) { kernel(work, i, i + 1); });
}

// The same for kernels that leave one sum a block row.
template <class Work>
double run_sums(void (*kernel)(const Work&, int64_t, int64_t), Work work, int64_t blocks,
                double elements, int threads) {
  std::vector<double> sums(size_t(blocks), 0.0);
  work.sums = sums.data();
  run_rows(kernel, work, blocks, elements, threads);
  double sum = 0;
  for (double value : sums) sum += value;
  return sum;
}

double elements(const Matrix& m) { return double(m.rows) * double(m.cols); }
int precision(const Matrix& m) { return m.dtype == DType::kF64 ? 1 : 0; }
int64_t blocks_of(const Matrix& m) {
  return row_blocks(m.rows, m.dtype == DType::kF64 ? Kind::kF64 : Kind::kF32);
}

}  // namespace

double run(const SquareAverage& p, int threads) {
  return run_sums(kernels().square_average[precision(p.v)], p, blocks_of(p.v), elements(p.v),
                  threads);
}
double run(const AdaptedLength& p, int threads) {
  return run_sums(kernels().adapted_length[precision(p.v)], p, blocks_of(p.v), elements(p.v),
                  threads);
}
void run(const AdamMoments& p, int threads) {
  run_rows(kernels().adam_moments[precision(p.m)], p, blocks_of(p.m), elements(p.m), threads);
}
void run(const Momentum& p, int threads) {
  run_rows(kernels().momentum[precision(p.m)], p, blocks_of(p.m), elements(p.m), threads);
}
void run(const VarianceAdaptation& p, int threads) {
  run_rows(kernels().variance_adaptation[p.o.kind == Kind::kF64 ? 1 : 0], p,
           row_blocks(p.o.rows, p.o.kind), double(p.o.rows) * double(p.o.cols), threads);
}
double run(const SignAdaptation& p, int threads) {
  return run_sums(kernels().sign_adaptation[precision(p.m)], p, blocks_of(p.m), elements(p.m),
                  threads);
}

Panels part(const Panels& p, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
  const int64_t P = kernels().panel[int(p.kind)], size = p.kind == Kind::kF64 ? 8 : 4;
  char* data = static_cast<char*>(p.data) + (c0 / P * p.stride + r0 * P) * size;
  return {data, rows, cols, p.kind, p.stride};
}

namespace {

// The number that max_abs_bits found, NaN for one that is not finite.
double value_of(uint64_t bits, DType dtype) {
  double value;
  if (dtype == DType::kF64) {
    std::memcpy(&value, &bits, sizeof value);
  } else {
    const uint32_t low = uint32_t(bits);
    float single;
    std::memcpy(&single, &low, sizeof single);
    value = single;
  }
  return std::isfinite(value) ? value : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

double max_abs(const Matrix& m, int threads) {
  if (m.rows == 0 || m.cols == 0) return 0;
  const Kernels& k = kernels();
  constexpr int64_t kScanGrain = 1 << 18;  // elements a job
  // Rows are the long way round for a transposed view.
  const Matrix view = m.row_stride == 1 && m.col_stride != 1 ? m.transposed() : m;
  const int64_t jobs = std::clamp<int64_t>(view.rows * view.cols / kScanGrain, 1, view.rows);
  std::vector<uint64_t> most(size_t(jobs), 0);
  parallel_jobs(jobs, threads, [&](int64_t i) {
    most[size_t(i)] = k.max_abs_bits(view, view.rows * i / jobs, view.rows * (i + 1) / jobs);
  });
  return value_of(*std::max_element(most.begin(), most.end()), m.dtype);
}

int exponent_of(double x) { return x > 0 ? std::ilogb(x) : 0; }

Matrix flat(const Panels& p) {
  const int64_t count =
      ceil_div(p.cols, kernels().panel[int(p.kind)]) * words_of_panel(p.rows, p.kind);
  switch (p.kind) {
    case Kind::kF32:
      return {p.data, 1, count, count, 1, DType::kF32};
    case Kind::kF64:
      return {p.data, 1, count, count, 1, DType::kF64};
    case Kind::kBF16:
      return {p.data, 1, 2 * count, 2 * count, 1, DType::kBF16};
  }
  return {};
}

double element(const Panels& p, int64_t i, int64_t j) {
  const int64_t P = kernels().panel[int(p.kind)];
  const int64_t at = j / P * p.stride + (p.kind == Kind::kBF16 ? i / 2 : i) * P + j % P;
  switch (p.kind) {
    case Kind::kF32:
      return double(static_cast<const float*>(p.data)[at]);
    case Kind::kF64:
      return static_cast<const double*>(p.data)[at];
    case Kind::kBF16: {
      const uint32_t pair = static_cast<const uint32_t*>(p.data)[at];
      const uint32_t bits = i % 2 == 0 ? pair << 16 : pair & 0xffff0000u;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return double(value);
    }
  }
  return 0;
}

void set_element(const Panels& p, int64_t i, int64_t j, double value) {
  const int64_t P = kernels().panel[int(p.kind)], at = j / P * p.stride + i * P + j % P;
  if (p.kind == Kind::kF64)
    static_cast<double*>(p.data)[at] = value;
  else
    static_cast<float*>(p.data)[at] = float(value);
}

double trace(const Panels& p) {
  double sum = 0;
  for (int64_t i = 0; i < std::min(p.rows, p.cols); i++) sum += element(p, i, i);
  return sum;
}

std::vector<double> column_sums(ColumnSum what, const Panels& a, const Panels& b, int threads) {
  const Kernels& k = kernels();
  const auto kernel = k.column_sums[a.kind == Kind::kF64 ? 1 : 0];
  const int64_t blocks = ceil_div(a.cols, k.panel[int(a.kind)]);
  std::vector<double> sums(size_t(a.cols), 0.0);
  if (double(a.rows) * double(a.cols) < 2 * kPackGrain) threads = 1;
  parallel_jobs(blocks, threads, [&](int64_t j) { kernel(what, a, b, j, j + 1, sums.data()); });
  return sums;
}

double sum_of_squares(const Panels& p, int threads) {
  double sum = 0;
  for (double column : column_sums(ColumnSum::kDot, p, p, threads)) sum += column;
  return sum;
}

namespace {

void convert(double value, double& to) { to = value; }
void convert(double value, float& to) { to = float(value); }
template <class T>  // of 16 bits
void convert(double value, T& to) {
  to = T(float(value));
}

void* address(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<char*>(m.data) +
         (i * m.row_stride + j * m.col_stride) * int64_t(element_size(m.dtype));
}

// Square by square, so that both of two matrices, one the other way round, stay in cache.
template <class F>
void for_each_block(int64_t rows, int64_t cols, const F& f) {
  constexpr int64_t kSide = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kSide)
    for (int64_t j0 = 0; j0 < cols; j0 += kSide)
      for (int64_t i = i0; i < std::min(i0 + kSide, rows); i++)
        for (int64_t j = j0; j < std::min(j0 + kSide, cols); j++) f(i, j);
}

template <class F>
void for_each_element(const Matrix& m, const F& f) {
  with_type(m.dtype, [&](auto zero) {
    for (int64_t i = 0; i < m.rows; i++)
      for (int64_t j = 0; j < m.cols; j++) f(*static_cast<decltype(zero)*>(address(m, i, j)));
  });
}

}  // namespace

void copy_scaled(const Matrix& from, int shift, const Matrix& to) {
  with_type(from.dtype, [&](auto source) {
    with_type(to.dtype, [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      const auto copy = [&](const auto& scaled) {
        for_each_block(from.rows, from.cols, [&](int64_t i, int64_t j) {
          convert(scaled(double(*static_cast<From*>(address(from, i, j)))),
                  *static_cast<To*>(address(to, i, j)));
        });
      };
      if (shift == 0) return copy([](double x) { return x; });
      copy([&](double x) { return std::ldexp(x, shift); });
    });
  });
}

double max_abs_lower(const Matrix& m) {
  const Kernels& k = kernels();
  uint64_t most = 0;
  for (int64_t i = 0; i < m.rows; i++) {
    Matrix row = m;
    row.data = address(m, i, 0);
    row.rows = 1;
    row.cols = i + 1;
    most = std::max(most, k.max_abs_bits(row, 0, 1));
  }
  return value_of(most, m.dtype);
}

double element(const Matrix& m, int64_t i, int64_t j) {
  double value = 0;
  with_type(m.dtype,
            [&](auto zero) { value = double(*static_cast<decltype(zero)*>(address(m, i, j))); });
  return value;
}

void fill(const Matrix& m, double value) {
  for_each_element(m, [&](auto& x) { convert(value, x); });
}

void scale_in_place(const Matrix& m, double factor) {
  for_each_element(m, [&](auto& x) {
    using T = std::remove_reference_t<decltype(x)>;
    if constexpr (std::is_same_v<T, double>)
      x *= factor;
    else
      x = T(float(x) * float(factor));
  });
}

}  // namespace spectral_kernels::cpu
