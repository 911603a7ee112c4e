#include "cholesky.h"

#include <cmath>
#include <string_view>

#include "isa/target.h"

namespace spectral_kernels::cpu {
namespace {

// Of the widest panels.
constexpr int64_t kWidest = 64;

// R and then W = R⁻¹ of n x n numbers with row length kWidest, upper triangles. False if a pivot is
// not positive.
inline __attribute__((always_inline)) bool invert(int64_t n, double (*r)[kWidest],
                                                  double (*w)[kWidest]) {
  double inverse[kWidest];
  for (int64_t k = 0; k < n; k++) {
    const double pivot = r[k][k];
    if (!(pivot > 0)) return false;
    inverse[k] = 1 / std::sqrt(pivot);
    for (int64_t j = k; j < n; j++) r[k][j] *= inverse[k];
    for (int64_t i = k + 1; i < n; i++) {
      const double factor = r[k][i];
      for (int64_t j = i; j < n; j++) r[i][j] -= factor * r[k][j];
    }
  }
  // Row i of R W = I, from the last: W_i = (e_i - sum over k > i of R_ik W_k) / R_ii.
  for (int64_t i = n - 1; i >= 0; i--) {
    for (int64_t j = 0; j < n; j++) w[i][j] = 0;
    w[i][i] = 1;
    for (int64_t k = i + 1; k < n; k++) {
      const double factor = r[i][k];
      for (int64_t j = k; j < n; j++) w[i][j] -= factor * w[k][j];
    }
    for (int64_t j = i; j < n; j++) w[i][j] *= inverse[i];
  }
  return true;
}

#if defined(__x86_64__)
SK_TARGET_BEGIN("avx2,fma")
bool invert_avx2(int64_t n, double (*r)[kWidest], double (*w)[kWidest]) { return invert(n, r, w); }
SK_TARGET_END
#endif

bool invert_factor(int64_t n, double (*r)[kWidest], double (*w)[kWidest]) {
#if defined(__x86_64__)
  if (std::string_view(kernels().name) != "baseline") return invert_avx2(n, r, w);
#endif
  return invert(n, r, w);
}

// The diagonal block [c, c + n) with n <= P, in fp64.
template <class T>
bool cholesky_inverse_block(const Panels& s, const Panels& w, const Panels& wt, int64_t c,
                            int64_t n) {
  const int64_t P = kernels().panel[int(s.kind)];
  alignas(64) double r[kWidest][kWidest], inverse[kWidest][kWidest];
  const T* from = static_cast<const T*>(part(s, c, n, c, n).data);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = i; j < n; j++) r[i][j] = double(from[i * P + j]);
  if (!invert_factor(n, r, inverse)) return false;
  T *out = static_cast<T*>(part(w, c, n, c, n).data),
    *out_t = static_cast<T*>(part(wt, c, n, c, n).data);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < P; j++) {
      out[i * P + j] = j < n ? T(inverse[i][j]) : T(0);
      out_t[i * P + j] = j < n ? T(inverse[j][i]) : T(0);
    }
  return true;
}

// Columns and rows [c, c + n). With S = [A B; Bᵀ D], R = [R1 C; 0 R2]: C = W1ᵀ B, R2ᵀ R2 = D - Cᵀ
// C, W = [W1 -W1 C W2; 0 W2].
bool cholesky_inverse_part(const Panels& s, const Panels& w, const Panels& wt, int64_t c, int64_t n,
                           int threads) {
  const int64_t P = kernels().panel[int(s.kind)];
  if (n <= P)
    return s.kind == Kind::kF64 ? cholesky_inverse_block<double>(s, w, wt, c, n)
                                : cholesky_inverse_block<float>(s, w, wt, c, n);
  const int64_t n1 = ceil_div(ceil_div(n, P), 2) * P, n2 = n - n1, c2 = c + n1;
  if (!cholesky_inverse_part(s, w, wt, c, n1, threads)) return false;
  const Panels w1 = part(w, c, n1, c, n1), w1t = part(wt, c, n1, c, n1);
  // C stands where W goes in the end, and what follows from it where S is not read.
  const Panels corner = part(w, c, n1, c2, n2), product_t = part(s, c2, n2, c, n1);
  Product form = multiply(w1, part(s, c, n1, c2, n2));
  form.a_t = w1t;
  form.a_shape = Triangle::kUpper;
  form.out = corner;
  run(form, threads);
  Product rest = multiply(corner, corner);
  rest.symmetric = true;
  rest.alpha = -1;
  rest.beta_panels = 1;
  rest.add_panels = rest.out = part(s, c2, n2, c2, n2);
  run(rest, threads);
  // -W1 C, transposed.
  Product left = multiply(w1t, corner);
  left.a_t = w1;
  left.a_shape = Triangle::kLower;
  left.alpha = -1;
  left.out_t = product_t;
  run(left, threads);
  if (!cholesky_inverse_part(s, w, wt, c2, n2, threads)) return false;
  Product last = multiply(product_t, part(w, c2, n2, c2, n2));
  last.b_shape = Triangle::kUpper;
  last.out = part(w, c, n1, c2, n2);
  last.out_t = part(wt, c2, n2, c, n1);
  run(last, threads);
  return true;
}

}  // namespace

bool cholesky_inverse(const Panels& s, const Panels& w, const Panels& wt, int threads) {
  return cholesky_inverse_part(s, w, wt, 0, s.cols, threads);
}

}  // namespace spectral_kernels::cpu
