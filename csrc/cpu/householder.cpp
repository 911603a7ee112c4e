#include "householder.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace spectral_kernels::cpu {
namespace {

// Columns that are reflected by one V T Vᵀ. The rounding of T grows with them: at n = 512 in fp32
// ||QᵀQ - I||_F was 9.5, 12, 16 and 21 u sqrt(n) for 64, 128, 256 and 512, LAPACK's is 10.
constexpr int64_t kBlockColumns = 128;

// H = I - V T Vᵀ of every block of columns. V stands in the matrix that is factorized, T and Tᵀ in
// the first rows of the block's columns. What is above V's and below T's diagonal is never read.
class Reflector {
 public:
  Reflector(const Panels& v, const Panels& vt, const Panels& t, const Panels& tt,
            const Panels& first, const Panels& second, int threads)
      : v_(v),
        vt_(vt),
        t_(t),
        tt_(tt),
        first_(first),
        second_(second),
        signs_(size_t(v.cols)),
        width_(kernels().panel[int(v.kind)]),
        block_(std::max<int64_t>(kBlockColumns / width_, 1) * width_),
        threads_(threads) {}

  void factorize() {
    for (int64_t c = 0; c < v_.cols; c += block_) {
      const int64_t n = std::min(block_, v_.cols - c), rest = v_.cols - c - n;
      factorize(c, c, n);
      if (rest > 0) apply_transposed(c, c, n, c + n, rest);
    }
  }

  // Q <- H_1 H_2 ... I, and Qᵀ, which may take the place of T's transpose.
  void form(const Panels& q, const Panels& qt) {
    Combine identity;
    identity.out = q;
    identity.gamma = 1;
    run(identity, threads_);
    for (int64_t c = (ceil_div(v_.cols, block_) - 1) * block_; c >= 0; c -= block_) {
      const int64_t n = std::min(block_, v_.cols - c), rest = v_.cols - c;
      const Panels x = below(q, c, c, rest), seen = part(first_, 0, n, 0, rest),
                   mixed = part(second_, 0, n, 0, rest);
      see(c, n, x, seen);
      Product mix = multiply(part(tt_, 0, n, c, n), part(t_, 0, n, c, n), seen);
      mix.a_shape = Triangle::kLower;
      mix.out = mixed;
      run(mix, threads_);
      Product change = multiply(right_of(vt_, c, c, n), below(v_, c, c, n), mixed);
      change.a_shape = Triangle::kUpper;
      subtract(change, x, c == 0 ? qt : Panels{});
    }
  }

  const double* signs() const { return signs_.data(); }

 private:
  static Panels below(const Panels& m, int64_t row, int64_t c, int64_t n) {
    return part(m, row, m.rows - row, c, n);
  }
  static Panels right_of(const Panels& m_t, int64_t column, int64_t r, int64_t n) {
    return part(m_t, r, n, column, m_t.cols - column);
  }

  // Columns [c, c + n) of the block that begins with column `begin`.
  void factorize(int64_t begin, int64_t c, int64_t n) {
    if (n <= width_) return factorize_panel(begin, c, n);
    const int64_t n1 = ceil_div(ceil_div(n, width_), 2) * width_, n2 = n - n1, c2 = c + n1;
    factorize(begin, c, n1);
    apply_transposed(begin, c, n1, c2, n2);
    factorize(begin, c2, n2);
    // T12 = -T1 (V1ᵀ V2) T2.
    const int64_t r = c - begin, r2 = c2 - begin;
    const Panels between = part(first_, 0, n1, 0, n2), left_t = part(second_, 0, n2, 0, n1);
    Product see = multiply(below(v_, c2, c, n1), right_of(vt_, c2, c, n1), below(v_, c2, c2, n2));
    see.b_shape = Triangle::kLower;
    see.out = between;
    run(see, threads_);
    Product left = multiply(part(tt_, r, n1, c, n1), part(t_, r, n1, c, n1), between);
    left.a_shape = Triangle::kLower;
    left.alpha = -1;
    left.out_t = left_t;
    run(left, threads_);
    Product right = multiply(left_t, part(t_, r2, n2, c2, n2));
    right.b_shape = Triangle::kUpper;
    right.out = part(t_, r, n1, c2, n2);
    right.out_t = part(tt_, r2, n2, c, n1);
    run(right, threads_);
  }

  void factorize_panel(int64_t begin, int64_t c, int64_t n) {
    std::vector<double> t(size_t(width_ * width_), 0.0);
    Reflections work;
    work.x = below(v_, c, c, n);
    work.t = t.data();
    work.signs = signs_.data() + c;
    kernels().reflect[v_.kind == Kind::kF64 ? 1 : 0](work);
    Combine transpose;
    transpose.a = work.x;
    transpose.out_t = right_of(vt_, c, c, n);
    run(transpose, 1);
    Pack pack;
    pack.x = Matrix{t.data(), n, n, width_, 1, DType::kF64};
    pack.out = part(t_, c - begin, n, c, n);
    pack.out_t = part(tt_, c - begin, n, c, n);
    run(pack, 1);
  }

  // X <- Hᵀ X = X - V Tᵀ (Vᵀ X), H that of the columns [c, c + n), for the columns [c2, c2 + n2).
  // Of the result, rows [c, c + n) are R: not needed, and not written.
  void apply_transposed(int64_t begin, int64_t c, int64_t n, int64_t c2, int64_t n2) {
    const Panels seen = part(first_, 0, n, 0, n2), mixed = part(second_, 0, n, 0, n2);
    see(c, n, below(v_, c, c2, n2), seen);
    const int64_t r = c - begin;
    Product mix = multiply(part(t_, r, n, c, n), part(tt_, r, n, c, n), seen);
    mix.a_shape = Triangle::kUpper;
    mix.out = mixed;
    run(mix, threads_);
    const int64_t row = c + n;
    subtract(multiply(right_of(vt_, row, c, n), below(v_, row, c, n), mixed),
             below(v_, row, c2, n2), Panels{});
  }

  // Vᵀ X.
  void see(int64_t c, int64_t n, const Panels& x, const Panels& out) {
    Product p = multiply(below(v_, c, c, n), right_of(vt_, c, c, n), x);
    p.a_shape = Triangle::kLower;
    p.out = out;
    run(p, threads_);
  }

  void subtract(Product product, const Panels& from, const Panels& out_t) {
    product.alpha = -1;
    product.beta_panels = 1;
    product.add_panels = product.out = from;
    product.out_t = out_t;
    run(product, threads_);
  }

  const Panels v_, vt_, t_, tt_, first_, second_;
  std::vector<double> signs_;
  const int64_t width_, block_;
  const int threads_;
};

}  // namespace

void orthonormal_factor(Panels& p, Panels& pt, Panels* free, int threads) {
  Reflector reflector(p, free[0], free[1], free[2], free[3], pt, threads);
  reflector.factorize();
  reflector.form(free[4], free[2]);
  std::swap(p, free[4]);
  std::swap(pt, free[2]);
  scale_columns(p, pt, reflector.signs(), threads);
}

}  // namespace spectral_kernels::cpu
