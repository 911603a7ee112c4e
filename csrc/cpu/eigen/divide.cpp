#include "divide.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "../parallel.h"
#include "../product.h"
#include "secular.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon() / 2;
constexpr int64_t kLeaf = 32;

// T has a norm near 1: no square overflows, and what is as small as this is nothing beside it.
constexpr double kNothing = 0x1p-480;
double length(double x, double y) { return std::sqrt(x * x + y * y); }

// (x, y) <- (c x + s y, c y - s x)
void rotate(int64_t n, double* x, double* y, double c, double s) {
  for (int64_t i = 0; i < n; i++) {
    const double of_x = x[i], of_y = y[i];
    x[i] = c * of_x + s * of_y;
    y[i] = c * of_y - s * of_x;
  }
}

// By QL steps with implicit shifts, which lose least where the diagonal ascends: a matrix of the
// other kind is turned round. z begins as zeros.
bool small_eigen(int64_t n, double* d, double* e, double* z, int64_t pitch) {
  const bool turned = std::abs(d[0]) > std::abs(d[n - 1]);
  if (turned) {
    std::reverse(d, d + n);
    std::reverse(e, e + n - 1);
  }
  for (int64_t i = 0; i < n; i++) z[i * pitch + (turned ? n - 1 - i : i)] = 1;
  constexpr int kMost = 60;  // steps for one eigenvalue
  for (int64_t l = 0; l < n; l++)
    for (int step = 0;; step++) {
      int64_t m = l;
      while (m + 1 < n &&
             !(std::abs(e[m]) <= kEps * (std::abs(d[m]) + std::abs(d[m + 1])) + kNothing))
        m++;
      if (m == l) break;
      if (step == kMost) return false;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(length(g, 1), g));
      double s = 1, c = 1, p = 0;
      bool split = false;
      for (int64_t i = m - 1; i >= l; i--) {
        const double f = s * e[i], b = c * e[i], r = length(f, g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= p;
          e[m] = 0;
          split = true;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * s + 2 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
        rotate(n, z + (i + 1) * pitch, z + i * pitch, c, s);
      }
      if (split) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  return true;
}

// The two halves of [begin, end) are decomposed: T is diag(T1, T2) + |e| u uᵀ where u has ones on
// both sides of the cut, the second with the sign of e, and |e| has been taken off the diagonals.
// Cuppen, Numer. Math. 36, 177 (1981); deflation and eigenvectors as Gu and Eisenstat, SIAM J.
// Matrix Anal. Appl. 16, 172 (1995).
class Merge {
 public:
  Merge(int64_t begin, int64_t middle, int64_t end, double e, std::vector<double>& d,
        const DivideSpace& space, std::vector<int64_t>& order, int threads)
      : n_(end - begin),
        n1_(middle - begin),
        pitch_(space.pitch),
        threads_(threads),
        d_(d.data() + begin),
        z_(space.z + begin * pitch_ + begin),
        spare_(space.spare + begin * pitch_),
        lines_(space.lines + begin * pitch_),
        left_(space.left + begin * pitch_),
        right_(space.right + begin * space.right_pitch),
        order_(order.data() + begin),
        coupling_(size_t(n_)),
        side_(size_t(n_)) {
    for (int64_t i = 0; i < n_; i++) {
      const bool first = i < n1_;
      const double of_row = row(i)[first ? n1_ - 1 : n1_];
      coupling_[size_t(i)] = (first || e >= 0 ? of_row : -of_row) * std::sqrt(0.5);
      side_[size_t(i)] = first ? kFirst : kSecond;
    }
    rho_ = 2 * std::abs(e);
  }

  void run() {
    deflate();
    if (!kept_.empty()) combine();
    std::iota(order_, order_ + n_, int64_t(0));
    std::stable_sort(order_, order_ + n_, [&](int64_t i, int64_t j) { return d_[i] < d_[j]; });
  }

 private:
  enum Side : char { kFirst, kBoth, kSecond };  // where a row is not 0

  double* row(int64_t i) { return z_ + i * pitch_; }
  double& coupling(int64_t i) { return coupling_[size_t(i)]; }

  // The eigenvalues that the coupling leaves as they are; of two that are as good as equal one
  // becomes such by a rotation. The others are kept.
  void deflate() {
    std::vector<int64_t> ascending(static_cast<size_t>(n_));
    std::vector<int64_t> second(order_ + n1_, order_ + n_);
    for (int64_t& i : second) i += n1_;
    std::merge(order_, order_ + n1_, second.begin(), second.end(), ascending.begin(),
               [&](int64_t i, int64_t j) { return d_[i] < d_[j]; });
    double most_d = 0, most_z = 0;
    for (int64_t i = 0; i < n_; i++) {
      most_d = std::max(most_d, std::abs(d_[i]));
      most_z = std::max(most_z, std::abs(coupling(i)));
    }
    const double tolerance = 8 * kEps * std::max(most_d, most_z);
    if (rho_ * most_z <= tolerance) return;
    int64_t before = -1;
    for (const int64_t i : ascending) {
      if (rho_ * std::abs(coupling(i)) <= tolerance) continue;
      if (before >= 0 && !joined(before, i, tolerance)) kept_.push_back(before);
      before = i;
    }
    kept_.push_back(before);
  }

  // Whether d_i and d_j are so near that a rotation may take the whole coupling to j.
  bool joined(int64_t i, int64_t j, double tolerance) {
    const double joint = length(coupling(i), coupling(j)), gap = d_[j] - d_[i];
    const double c = coupling(j) / joint, s = -coupling(i) / joint;
    if (!(std::abs(gap * c * s) <= tolerance)) return false;
    coupling(j) = joint;
    coupling(i) = 0;
    if (side_[size_t(i)] != side_[size_t(j)]) side_[size_t(i)] = side_[size_t(j)] = kBoth;
    rotate(n_, row(i), row(j), c, s);
    const double of_i = d_[i] * c * c + d_[j] * s * s, of_j = d_[i] * s * s + d_[j] * c * c;
    d_[i] = of_i;
    d_[j] = of_j;
    return true;
  }

  void combine() {
    const int64_t k = int64_t(kept_.size());
    // Rows that are 0 in one half are multiplied in the other only.
    std::vector<int64_t> grouped;
    int64_t count[3] = {};
    for (const Side side : {kFirst, kBoth, kSecond})
      for (int64_t i = 0; i < k; i++)
        if (side_[size_t(kept_[size_t(i)])] == side) {
          grouped.push_back(i);
          count[side]++;
        }
    std::vector<double> d(static_cast<size_t>(k)), z2(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; i++) {
      d[size_t(i)] = d_[kept_[size_t(i)]];
      z2[size_t(i)] = coupling(kept_[size_t(i)]) * coupling(kept_[size_t(i)]);
    }
    // Line i are the differences of d and eigenvalue i, later its eigenvector.
    std::vector<double> values(static_cast<size_t>(k));
    constexpr int64_t kRoots = 16;  // a job
    const int threads = k * k < kGrain ? 1 : threads_;
    const int64_t jobs = ceil_div(k, kRoots);
    parallel_jobs(jobs, threads, [&](int64_t job) {
      for (int64_t i = job * kRoots; i < std::min((job + 1) * kRoots, k); i++) {
        double* const line = lines_ + i * k;
        if (k == 1) {
          values[0] = d[0] + rho_ * z2[0];
          line[0] = -rho_ * z2[0];
          continue;
        }
        const SecularRoot root = secular_root(i, k, d.data(), z2.data(), rho_);
        const double origin = d[size_t(root.origin)];
        values[size_t(i)] = origin + root.mu;
        for (int64_t j = 0; j < k; j++) line[j] = (d[size_t(j)] - origin) - root.mu;
      }
    });
    // The coupling for which these are the exact eigenvalues: their eigenvectors are orthogonal,
    // however near two of them are.
    std::vector<double> exact(size_t(k), 1.0);
    parallel_jobs(jobs, threads, [&](int64_t job) {
      const int64_t first = job * kRoots, past = std::min((job + 1) * kRoots, k);
      for (int64_t i = 0; i < k; i++) {
        const double* const line = lines_ + i * k;
        for (int64_t j = first; j < past; j++)
          exact[size_t(j)] *= j == i ? line[j] : line[j] / (d[size_t(j)] - d[size_t(i)]);
      }
      for (int64_t j = first; j < past; j++)
        exact[size_t(j)] =
            std::copysign(std::sqrt(std::max(-exact[size_t(j)], 0.0)), coupling(kept_[size_t(j)]));
    });
    parallel_jobs(jobs, threads, [&](int64_t job) {
      std::vector<double> vector(static_cast<size_t>(k));
      for (int64_t i = job * kRoots; i < std::min((job + 1) * kRoots, k); i++) {
        double* const line = lines_ + i * k;
        double squares = 0;
        for (int64_t j = 0; j < k; j++) {
          vector[size_t(j)] = exact[size_t(j)] / line[j];
          squares += vector[size_t(j)] * vector[size_t(j)];
        }
        const double by = 1 / std::sqrt(squares);
        for (int64_t j = 0; j < k; j++) line[j] = by * vector[size_t(grouped[size_t(j)])];
      }
    });
    multiply(k, grouped, count);
    for (int64_t i = 0; i < k; i++) d_[kept_[size_t(i)]] = values[size_t(i)];
  }

  // The kept rows of z <- lines times those rows.
  void multiply(int64_t k, const std::vector<int64_t>& grouped, const int64_t (&count)[3]) {
    // Columns [c0, c0 + cols), where `used` rows from `from` on are not 0.
    const auto half = [&](int64_t from, int64_t used, int64_t c0, int64_t cols) {
      if (used == 0) {
        for (const int64_t i : kept_) std::fill_n(row(i) + c0, cols, 0.0);
        return;
      }
      for (int64_t i = 0; i < used; i++)
        std::copy_n(row(kept_[size_t(grouped[size_t(from + i)])]) + c0, cols, spare_ + i * cols);
      const Panels a = panels_at(left_, used, k, Kind::kF64),
                   b = panels_at(right_, used, cols, Kind::kF64);
      Pack pack_a, pack_b;
      pack_a.x = Matrix{lines_ + from, k, used, k, 1, DType::kF64};
      pack_a.out_t = a;
      cpu::run(pack_a, threads_);
      pack_b.x = Matrix{spare_, used, cols, cols, 1, DType::kF64};
      pack_b.out = b;
      cpu::run(pack_b, threads_);
      Product product = cpu::multiply(a, b);
      product.store = Matrix{spare_, k, cols, cols, 1, DType::kF64};
      cpu::run(product, threads_);
      for (int64_t i = 0; i < k; i++)
        std::copy_n(spare_ + i * cols, cols, row(kept_[size_t(i)]) + c0);
    };
    // The second half reads its columns of the rows, of which the first writes others.
    half(0, count[kFirst] + count[kBoth], 0, n1_);
    half(count[kFirst], count[kBoth] + count[kSecond], n1_, n_ - n1_);
  }

  static constexpr int64_t kGrain = 1 << 14;  // elements that are worth a second thread

  const int64_t n_, n1_, pitch_;
  const int threads_;
  double* const d_;
  double *const z_, *const spare_, *const lines_, *const left_, *const right_;
  int64_t* const order_;
  std::vector<double> coupling_;
  std::vector<char> side_;
  std::vector<int64_t> kept_;  // in ascending order of d
  double rho_;
};

// A packed matrix of n rows has up to n and a panel of columns.
int64_t pitch_of(int64_t n) {
  return ceil_div(n + kernels().panel[int(Kind::kF64)], int64_t(8)) * 8;
}

struct Node {
  int64_t begin, middle, end;
};

}  // namespace

DivideSpace::DivideSpace(Workspace& workspace, int64_t n, double* left)
    : pitch(pitch_of(n)), right_pitch(pitch_of(ceil_div(n, int64_t(2)))), left(left) {
  for (double** part : {&z, &spare, &lines})
    *part = static_cast<double*>(workspace.take(size_t(n * pitch) * sizeof(double)));
  right = static_cast<double*>(workspace.take(size_t(n * right_pitch) * sizeof(double)));
}

size_t DivideSpace::left_bytes(int64_t n) {
  return Workspace::rounded(size_t(n * pitch_of(n)) * sizeof(double));
}

size_t DivideSpace::bytes(int64_t n) {
  return 3 * left_bytes(n) +
         Workspace::rounded(size_t(n * pitch_of(ceil_div(n, int64_t(2)))) * sizeof(double));
}

bool tridiagonal_eigen(int64_t n, std::vector<double>& d, const std::vector<double>& e,
                       const DivideSpace& space, int threads) {
  double* const z = space.z;
  const int64_t pitch = space.pitch;
  for (int64_t i = 0; i < n; i++) std::fill_n(z + i * pitch, n, 0.0);
  // Cut in two until the parts are leaves, the largest first.
  std::vector<std::vector<Node>> levels;
  std::vector<Node> leaves, here{{0, 0, n}};
  while (!here.empty()) {
    std::vector<Node> cut, next;
    for (const Node& node : here) {
      if (node.end - node.begin <= kLeaf) {
        leaves.push_back(node);
        continue;
      }
      const int64_t middle = node.begin + (node.end - node.begin) / 2;
      cut.push_back({node.begin, middle, node.end});
      next.push_back({node.begin, 0, middle});
      next.push_back({middle, 0, node.end});
      const double coupling = std::abs(e[size_t(middle - 1)]);
      d[size_t(middle - 1)] -= coupling;
      d[size_t(middle)] -= coupling;
    }
    levels.push_back(cut);
    here = next;
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::atomic<bool> converged{true};
  parallel_jobs(int64_t(leaves.size()), n < 4 * kLeaf ? 1 : threads, [&](int64_t leaf) {
    const int64_t begin = leaves[size_t(leaf)].begin, size = leaves[size_t(leaf)].end - begin;
    // A copy: the last of it is used, too, and stands here for the cut to the next leaf.
    std::vector<double> own(e.begin() + begin, e.begin() + begin + size);
    if (!small_eigen(size, d.data() + begin, own.data(), z + begin * pitch + begin, pitch))
      converged = false;
    std::iota(order.begin() + begin, order.begin() + begin + size, int64_t(0));
    std::stable_sort(
        order.begin() + begin, order.begin() + begin + size,
        [&](int64_t i, int64_t j) { return d[size_t(begin + i)] < d[size_t(begin + j)]; });
  });
  if (!converged) return false;
  for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
    const bool alone = level->size() == 1;  // side by side where there are more
    parallel_jobs(int64_t(level->size()), alone ? 1 : threads, [&](int64_t i) {
      const Node& node = (*level)[size_t(i)];
      Merge(node.begin, node.middle, node.end, e[size_t(node.middle - 1)], d, space, order,
            alone ? threads : 1)
          .run();
    });
  }
  const std::vector<double> unsorted = d;
  for (int64_t k = 0; k < n; k++) {
    d[size_t(k)] = unsorted[size_t(order[size_t(k)])];
    std::copy_n(z + order[size_t(k)] * pitch, n, space.spare + k * pitch);
  }
  return true;
}

}  // namespace spectral_kernels::cpu
