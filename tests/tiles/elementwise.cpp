// The elementwise parts of the fused steps against plain loops, in fp32 and fp64.
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

constexpr double kBeta1 = 0.75, kBeta2 = 0.875, kScale = 1.5, kEps = 1e-3;

// One shape in one precision: T is float or double.
template <class T>
class Elementwise {
 public:
  Elementwise(const Kernels& kernels, int64_t m, int64_t n)
      : kernels_(kernels),
        rows_(m),
        cols_(n),
        blocks_(ceil_div(m, kernels.panel[int(kKind)])),
        g_(gaussian(m, n)),
        m_(gaussian(m, n)),
        v_(dense(m, n, [&](int64_t i, int64_t j) { return g_(j % m, i % n) * g_(j % m, i % n); })),
        sums_(size_t(blocks_), 1e9) {}

  void check_all() {
    square_average();
    adapted_length();
    adam_moments();
    for (const bool nesterov : {false, true})
      for (const bool sign : {false, true}) momentum(nesterov, sign);
    for (const EpsPlace place : {EpsPlace::kInside, EpsPlace::kOutside}) {
      variance_adaptation(place, true);
      for (const bool of_m : {false, true}) sign_adaptation(place, of_m);
    }
    variance_adaptation(EpsPlace::kInside, false);
  }

 private:
  static constexpr bool kWide = sizeof(T) == 8;
  static constexpr Kind kKind = kWide ? Kind::kF64 : Kind::kF32;
  static constexpr double kTolerance = kWide ? 1e-14 : 2e-6;

  template <class F>
  Dense each(const F& f) const {
    return dense(rows_, cols_, f);
  }
  Packed packed(const Dense& x) const { return Packed(kernels_, kKind, x); }
  Packed blank(int64_t rows, int64_t cols) const { return Packed(kernels_, kKind, rows, cols); }
  std::string named(const char* what) const {
    return std::string(what) + (kWide ? " f64 " : " f32 ") + std::to_string(rows_) + "x" +
           std::to_string(cols_);
  }
  template <class M>
  void same(const char* what, const M& got, const Dense& expected) const {
    compare(named(what), got, expected, kTolerance);
  }
  void same_both(const char* what, const Packed& out, const Packed& out_t, const Dense& u) const {
    compare_packed(named(what), out, u, kTolerance);
    compare_packed(named(what), out_t, transposed(u), kTolerance);
  }
  void same_sum(const char* what, const std::vector<double>& slots, const Dense& of) const {
    double got = 0, wanted = 0;
    for (double x : slots) got += x;
    for (double x : of.values) wanted += x;
    same(
        what, [&](int64_t, int64_t) { return got; },
        dense(1, 1, [&](int64_t, int64_t) { return wanted; }));
  }

  // Adam's moments and where their ratio goes.
  template <class Work>
  void give_moments(Work& work, const Packed& g, Strided<T>& m, Strided<T>& v) const {
    work.g = g.panels;
    work.m = m.matrix;
    work.v = v.matrix;
    work.beta1 = kBeta1;
    work.beta2 = kBeta2;
    work.eps = kEps;
  }

  void square_average() {
    const Strided<T> g(g_, false);
    Strided<T> v(v_, true);
    SquareAverage work;
    work.g = g.matrix;
    work.v = v.matrix;
    work.beta = kBeta2;
    work.weight = 0.5;
    work.sums = sums_.data();
    kernels_.square_average[kWide](work, 0, blocks_);
    const Dense next =
        each([&](int64_t i, int64_t j) { return kBeta2 * v_(i, j) + 0.5 * g_(i, j) * g_(i, j); });
    same("square_average", v, next);
    same_sum("square_average, sum", sums_, next);
  }

  void adapted_length() {
    Dense zero = v_;
    zero(0, 0) = 0;  // 0 / 0 counts as 0
    Dense m = m_;
    m(0, 0) = 0;
    const Strided<T> moments(m, false), v(zero, false);
    AdaptedLength work;
    work.m = moments.matrix;
    work.v = v.matrix;
    work.m_scale = 2;
    work.v_scale = 4;
    work.sums = sums_.data();
    kernels_.adapted_length[kWide](work, 0, blocks_);
    same_sum("adapted_length", sums_, each([&](int64_t i, int64_t j) {
               const double below = std::sqrt(4 * zero(i, j)), d = 2 * m(i, j) / below;
               return below > 0 ? d * d : 0;
             }));
  }

  void adam_moments() {
    const Packed g = packed(g_);
    Strided<T> m(m_, false), v(v_, true);
    Packed out = blank(rows_, cols_), out_t = blank(cols_, rows_);
    AdamMoments work;
    give_moments(work, g, m, v);
    work.out = out.panels;
    work.out_t = out_t.panels;
    kernels_.adam_moments[kWide](work, 0, blocks_);
    const Dense moment = first_moment(),
                square = each([&](int64_t i, int64_t j) {
                  return kBeta2 * v_(i, j) + (1 - kBeta2) * g_(i, j) * g_(i, j);
                });
    same("adam_moments, m", m, moment);
    same("adam_moments, v", v, square);
    same_both("adam_moments, out", out, out_t, each([&](int64_t i, int64_t j) {
                return moment(i, j) / (std::sqrt(square(i, j)) + kEps);
              }));
  }

  void momentum(bool nesterov, bool sign) {
    const Packed g = packed(g_);
    Strided<T> m(m_, true);
    const Strided<T> v(v_, false);
    Packed out = blank(rows_, cols_);
    std::vector<double> m_rows(size_t(rows_), 1e9),
        g_rows = m_rows, m_cols(size_t(blocks_ * cols_), 1e9), g_cols = m_cols;
    Momentum work;
    work.g = g.panels;
    work.m = m.matrix;
    work.beta1 = kBeta1;
    work.nesterov = nesterov;
    work.sign = sign;
    work.out = out.panels;
    work.v = v.matrix;
    work.m_rows = m_rows.data();
    work.m_cols = m_cols.data();
    work.g_rows = g_rows.data();
    work.g_cols = g_cols.data();
    work.v_sums = sums_.data();
    kernels_.momentum[kWide](work, 0, blocks_);
    const Dense moment = first_moment();
    same("momentum, m", m, moment);
    compare_packed(named("momentum, out"), out, each([&](int64_t i, int64_t j) {
                     const double mix = mixed(nesterov, moment, i, j);
                     return sign ? double((mix > 0) - (mix < 0)) : mix;
                   }),
                   kTolerance);
    same_sum("momentum, v", sums_, v_);
    squares("momentum, sums of m", moment, m_rows, m_cols);
    squares("momentum, sums of g", g_, g_rows, g_cols);
  }

  void squares(const char* what, const Dense& x, const std::vector<double>& by_row,
               const std::vector<double>& by_col) const {
    Dense rows(rows_, 1), cols(1, cols_);
    for (int64_t i = 0; i < rows_; i++)
      for (int64_t j = 0; j < cols_; j++) {
        rows(i, 0) += x(i, j) * x(i, j);
        cols(0, j) += x(i, j) * x(i, j);
      }
    same(what, [&](int64_t i, int64_t) { return by_row[size_t(i)]; }, rows);
    same(
        what,
        [&](int64_t, int64_t j) {
          double sum = 0;
          for (int64_t b = 0; b < blocks_; b++) sum += by_col[size_t(b * cols_ + j)];
          return sum;
        },
        cols);
  }

  void variance_adaptation(EpsPlace place, bool with_v) {
    const Packed o = packed(g_);
    Strided<T> v(v_, false);
    Packed out = blank(rows_, cols_), out_t = blank(cols_, rows_);
    const auto positive = [](int64_t n) {
      return dense(n, 1, [](int64_t i, int64_t) { return 0.5 + double(i % 7); });
    };
    const Dense row = positive(rows_), col = positive(cols_);
    VarianceAdaptation work;
    work.o = o.panels;
    if (with_v) work.v = v.matrix;
    work.beta2 = kBeta2;
    work.v_scale = 2;
    work.eps = kEps;
    work.scale = kScale;
    work.place = place;
    work.seen_row = work.row = row.values.data();
    work.seen_col = work.col = col.values.data();
    work.out = out.panels;
    work.out_t = out_t.panels;
    kernels_.variance_adaptation[kWide](work, 0, blocks_);
    const Dense energy = each([&](int64_t i, int64_t j) { return row(i, 0) * col(j, 0); });
    const Dense next =
        each([&](int64_t i, int64_t j) { return kBeta2 * v_(i, j) + (1 - kBeta2) * energy(i, j); });
    if (with_v) same("variance_adaptation, v", v, next);
    same_both("variance_adaptation, out", out, out_t, each([&](int64_t i, int64_t j) {
                const double gain =
                    with_v ? ratio(energy(i, j), 2 * next(i, j), place) : energy(i, j);
                return kScale * gain * g_(i, j);
              }));
  }

  void sign_adaptation(EpsPlace place, bool of_m) {
    const Packed g = packed(g_);
    Strided<T> m(m_, false), v(v_, true);
    Packed out = blank(rows_, cols_), out_t = blank(cols_, rows_);
    SignAdaptation work;
    give_moments(work, g, m, v);
    work.m_scale = 2;
    work.v_scale = 4;
    work.scale = kScale;
    work.nesterov = true;
    work.seen_m = of_m;
    work.top_m = of_m;
    work.place = place;
    work.sums = sums_.data();
    work.out = out.panels;
    work.out_t = out_t.panels;
    kernels_.sign_adaptation[kWide](work, 0, blocks_);
    const Dense moment = first_moment();
    const auto seen = [&](int64_t i, int64_t j) { return of_m ? 2 * moment(i, j) : g_(i, j); };
    const Dense next = each([&](int64_t i, int64_t j) {
      return kBeta2 * v_(i, j) + (1 - kBeta2) * seen(i, j) * seen(i, j);
    });
    same("sign_adaptation, v", v, next);
    same("sign_adaptation, m of pass 0", m, m_);
    same_sum("sign_adaptation, sum", sums_, next);
    work.pass = 1;
    kernels_.sign_adaptation[kWide](work, 0, blocks_);
    same("sign_adaptation, m", m, moment);
    same_both("sign_adaptation, out", out, out_t, each([&](int64_t i, int64_t j) {
                const double mix = mixed(true, moment, i, j);
                return kScale * ratio(seen(i, j) * seen(i, j), 4 * next(i, j), place) *
                       ((mix > 0) - (mix < 0));
              }));
  }

  static double ratio(double energy, double v, EpsPlace place) {
    return place == EpsPlace::kInside ? std::sqrt(energy / (v + kEps))
                                      : std::sqrt(energy) / (std::sqrt(v) + kEps);
  }
  Dense first_moment() const {
    return each([&](int64_t i, int64_t j) { return kBeta1 * m_(i, j) + (1 - kBeta1) * g_(i, j); });
  }
  double mixed(bool nesterov, const Dense& moment, int64_t i, int64_t j) const {
    return nesterov ? kBeta1 * moment(i, j) + (1 - kBeta1) * g_(i, j) : moment(i, j);
  }

  const Kernels& kernels_;
  int64_t rows_, cols_, blocks_;
  Dense g_, m_, v_;
  std::vector<double> sums_;
};

template <class T>
void check_precision(const Kernels& kernels, int64_t P) {
  const int64_t shapes[][2] = {{1, 1}, {P, P}, {P + 3, 2 * P - 1}, {2 * P + 1, 5}};
  for (const auto& [m, n] : shapes) Elementwise<T>(kernels, m, n).check_all();
}

}  // namespace

void check_elementwise(const Kernels& kernels) {
  check_precision<float>(kernels, kernels.panel[int(Kind::kF32)]);
  check_precision<double>(kernels, kernels.panel[int(Kind::kF64)]);
}

}  // namespace spectral_kernels::cpu
