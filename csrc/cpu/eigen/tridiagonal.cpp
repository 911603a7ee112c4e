#include "tridiagonal.h"

#include <algorithm>
#include <cmath>

#include "../parallel.h"

namespace spectral_kernels::cpu {
namespace {

int64_t panel_width() { return kernels().panel[int(Kind::kF64)]; }

// The least normal number over the unit roundoff: such a sum of squares has lost digits.
constexpr double kSmallest = 0x1p-969;

// Half of the work multiplies the matrix by a vector, and so reads it once for every column. The
// rest waits until `block_` reflections can be applied in one product:
//     A <- A - V Wᵀ - W Vᵀ.
class Reduction {
 public:
  Reduction(const Panels& a, Tridiagonal& t, int threads)
      : a_(a),
        t_(t),
        n_(a.rows),
        width_(panel_width()),
        block_(ceil_div(kColumns, width_) * width_),
        threads_(threads),
        w_(size_t(block_ * t.pitch), 0.0),
        column_(size_t(t.pitch), 0.0),
        sums_(size_t(kMostParts * t.pitch), 0.0),
        dots_(size_t(kMostParts * 2 * block_), 0.0) {}

  void run_all() {
    for (int64_t c = 0; c < n_; c += block_) {
      const int64_t count = std::min(block_, n_ - c);
      for (int64_t i = 0; i < count; i++) reflect(c, i);
      if (c + count < n_) update(c, count);
    }
  }

 private:
  // Columns of a block: with more of them V and W leave the cache, with fewer the product has too
  // little to do.
  static constexpr int64_t kColumns = 24;
  // A product with a vector goes in parts of so many rows, and their sums are added up in order.
  static constexpr int64_t kMostParts = 8, kPartRows = 64;

  double* v(int64_t j) { return t_.lines + j * t_.pitch; }
  double* w(int64_t i) { return w_.data() + i * t_.pitch; }

  // Column c + i of what is left of A, and its reflection.
  void reflect(int64_t c, int64_t i) {
    const Kernels& k = kernels();
    const int64_t j = c + i;
    double* const column = column_.data();
    const double* const block = static_cast<const double*>(a_.data) + j / width_ * a_.stride;
    for (int64_t r = j; r < n_; r++) column[r] = block[r * width_ + j % width_];
    std::vector<double> by_v(static_cast<size_t>(i)), by_w(static_cast<size_t>(i));
    for (int64_t l = 0; l < i; l++) {
      by_v[size_t(l)] = -w(l)[j];
      by_w[size_t(l)] = -v(c + l)[j];
    }
    k.add_lines(i, v(c), t_.pitch, by_v.data(), j, n_, column);
    k.add_lines(i, w(0), t_.pitch, by_w.data(), j, n_, column);
    t_.d[size_t(j)] = column[j];
    double* const to = v(j);
    std::fill_n(to, t_.pitch, 0.0);
    if (j + 1 == n_) return;
    const double alpha = column[j + 1];
    double tail = 0;
    k.dot_lines(1, column, t_.pitch, column, j + 2, n_, &tail);
    if (!(tail > kSmallest)) {  // nothing to be reflected, or nothing beside A
      t_.e[size_t(j)] = alpha;
      std::fill_n(w(i), t_.pitch, 0.0);
      return;
    }
    const double length = std::sqrt(alpha * alpha + tail), r = alpha < 0 ? length : -length;
    const double tau = (r - alpha) / r, factor = 1 / (alpha - r);
    t_.e[size_t(j)] = r;
    t_.tau[size_t(j)] = tau;
    to[j + 1] = 1;
    for (int64_t l = j + 2; l < n_; l++) to[l] = factor * column[l];
    multiply(c, i, to);
    // w = tau A v - (tau² / 2) (vᵀ A v) v.
    double* const image = w(i);
    double along = 0;
    k.dot_lines(1, image, t_.pitch, to, j + 1, n_, &along);
    const double shift = -0.5 * tau * tau * along;
    for (int64_t l = j + 1; l < n_; l++) image[l] = tau * image[l] + shift * to[l];
  }

  // w_i <- A x, where A lacks the i reflections of its block.
  void multiply(int64_t c, int64_t i, const double* x) {
    const Kernels& k = kernels();
    const int64_t j = c + i, first = (j + 1) / width_, panels = ceil_div(n_, width_);
    const int64_t begin = first * width_, rows = n_ - begin;
    const int64_t parts = std::clamp(rows / kPartRows, int64_t(1), kMostParts);
    // Parts of about the same area.
    const auto panel_of = [&](int64_t part) {
      const double left = double(parts - part) / double(parts);
      return part == parts ? panels
                           : first + int64_t(double(panels - first) * (1 - std::sqrt(left)));
    };
    const auto row_of = [&](int64_t part) { return begin + rows * part / parts; };
    const bool small = double(rows) * double(rows) < kGrain;
    parallel_jobs(parts, small ? 1 : threads_, [&](int64_t part) {
      const int64_t j0 = panel_of(part), j1 = panel_of(part + 1);
      double* const y = sums_.data() + part * t_.pitch;
      std::fill(y + j0 * width_, y + t_.pitch, 0.0);
      k.symmetric_times(a_, x, j0, j1, y);
      double* const dots = dots_.data() + part * 2 * block_;
      k.dot_lines(i, v(c), t_.pitch, x, row_of(part), row_of(part + 1), dots);
      k.dot_lines(i, w(0), t_.pitch, x, row_of(part), row_of(part + 1), dots + block_);
    });
    double* const to = w(i);
    std::copy(sums_.data() + begin, sums_.data() + t_.pitch, to + begin);
    for (int64_t part = 1; part < parts; part++) {
      const double* const y = sums_.data() + part * t_.pitch;
      for (int64_t r = panel_of(part) * width_; r < n_; r++) to[r] += y[r];
    }
    std::vector<double> by_v(static_cast<size_t>(i), 0.0), by_w(static_cast<size_t>(i), 0.0);
    for (int64_t part = 0; part < parts; part++)
      for (int64_t l = 0; l < i; l++) {
        by_w[size_t(l)] -= dots_[size_t(part * 2 * block_ + l)];
        by_v[size_t(l)] -= dots_[size_t((part * 2 + 1) * block_ + l)];
      }
    k.add_lines(i, v(c), t_.pitch, by_v.data(), j + 1, n_, to);
    k.add_lines(i, w(0), t_.pitch, by_w.data(), j + 1, n_, to);
  }

  // What is left of A after the columns [c, c + count).
  void update(int64_t c, int64_t count) {
    const int64_t next = c + count, rows = n_ - next;
    Workspace workspace(2 * panel_bytes(2 * count, rows, Kind::kF64));
    const Panels left = take_panels(workspace, 2 * count, rows, Kind::kF64),
                 right = take_panels(workspace, 2 * count, rows, Kind::kF64);
    const auto pack = [&](double* lines, const Panels& out, int64_t row) {
      Pack p;
      p.x = Matrix{lines + next, count, rows, t_.pitch, 1, DType::kF64};
      p.out = part(out, row, count, 0, rows);
      run(p, threads_);
    };
    pack(v(c), left, 0);
    pack(w(0), left, count);
    pack(w(0), right, 0);
    pack(v(c), right, count);
    Product product = cpu::multiply(left, right);
    product.symmetric = true;
    product.alpha = -1;
    product.beta_panels = 1;
    product.add_panels = product.out = part(a_, next, rows, next, rows);
    run(product, threads_);
  }

  static constexpr double kGrain = 1 << 15;  // elements that are not worth a second thread

  const Panels a_;
  Tridiagonal& t_;
  const int64_t n_, width_, block_;
  const int threads_;
  std::vector<double> w_, column_, sums_, dots_;
};

// Reflections that are applied to X in one product.
int64_t columns_at_once() { return ceil_div(int64_t(96), panel_width()) * panel_width(); }

// T of I - V T Vᵀ, from the Gram matrix of V, both row by row.
void triangular_factor(int64_t count, const double* tau, const std::vector<double>& gram,
                       std::vector<double>& t) {
  for (int64_t k = 0; k < count; k++) {
    for (int64_t i = 0; i < k; i++) {
      double sum = 0;
      for (int64_t l = i; l < k; l++) sum += t[size_t(i * count + l)] * gram[size_t(k * count + l)];
      t[size_t(i * count + k)] = -tau[k] * sum;
    }
    t[size_t(k * count + k)] = tau[k];
  }
}

}  // namespace

Tridiagonal::Tridiagonal(Workspace& workspace, int64_t size)
    : n(size),
      pitch(ceil_div(size, panel_width()) * panel_width()),
      d(size_t(size), 0.0),
      e(size_t(size), 0.0),
      tau(size_t(size), 0.0),
      lines(static_cast<double*>(workspace.take(bytes(size)))) {}

size_t Tridiagonal::bytes(int64_t n) { return panel_bytes(n, n, Kind::kF64); }

void tridiagonalize(const Panels& a, Tridiagonal& t, int threads) {
  Reduction(a, t, threads).run_all();
}

size_t reflections_bytes(int64_t n) {
  const int64_t most = columns_at_once();
  return panel_bytes(n, most, Kind::kF64) + 3 * panel_bytes(most, n, Kind::kF64) +
         panel_bytes(most, most, Kind::kF64);
}

void apply_reflections(const Tridiagonal& t, const Panels& x, const Matrix& out, int threads) {
  const int64_t n = t.n, most = columns_at_once();
  for (int64_t c = (ceil_div(n, most) - 1) * most; c >= 0; c -= most) {
    const int64_t count = std::min(most, n - c), rows = n - c;
    Workspace workspace(reflections_bytes(n));
    const Panels v = take_panels(workspace, rows, count, Kind::kF64),
                 vt = take_panels(workspace, count, rows, Kind::kF64),
                 tt = take_panels(workspace, count, count, Kind::kF64),
                 seen = take_panels(workspace, count, n, Kind::kF64),
                 mixed = take_panels(workspace, count, n, Kind::kF64);
    Pack pack;
    pack.x = Matrix{t.lines + c * t.pitch + c, count, rows, t.pitch, 1, DType::kF64};
    pack.out = vt;
    pack.out_t = v;
    run(pack, threads);
    std::vector<double> gram(size_t(count * count)), factor(size_t(count * count), 0.0);
    Product see = multiply(v, v);
    see.symmetric = true;
    see.store = Matrix{gram.data(), count, count, count, 1, DType::kF64};
    run(see, threads);
    triangular_factor(count, t.tau.data() + c, gram, factor);
    Pack transposed;
    transposed.x = Matrix{factor.data(), count, count, count, 1, DType::kF64};
    transposed.out_t = tt;
    run(transposed, threads);
    const Panels below = part(x, c, rows, 0, n);
    Product first = multiply(v, below);
    first.a_shape = Triangle::kLower;
    first.out = seen;
    run(first, threads);
    Product second = multiply(tt, seen);
    second.a_shape = Triangle::kLower;
    second.out = mixed;
    run(second, threads);
    Product change = multiply(vt, mixed);
    change.a_shape = Triangle::kUpper;
    change.alpha = -1;
    change.beta_panels = 1;
    change.add_panels = below;
    if (c > 0)
      change.out = below;
    else
      change.store = out;
    run(change, threads);
  }
}

}  // namespace spectral_kernels::cpu
