// Products of packed matrices against plain loops.
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

struct Size {
  int64_t m, n, k;
};

std::string named(const char* what, Kind kind, const Size& s) {
  static const char* const kNames[] = {"f32", "f64", "bf16"};
  return std::string(what) + " " + kNames[int(kind)] + " " + std::to_string(s.m) + "x" +
         std::to_string(s.n) + "x" + std::to_string(s.k);
}

// All blocks of a product, `edge` at a time.
void run(const Kernels& kernels, const Product& p, int64_t edge) {
  const int64_t P = kernels.panel[int(p.a.kind)];
  const int64_t m = ceil_div(p.a.cols, P), n = ceil_div(p.b.cols, P);
  const size_t bytes = kernels.jobs[int(p.a.kind)].scratch_bytes(edge);
  std::vector<double> scratch(bytes / sizeof(double) + 8, std::nan(""));
  void* aligned = reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64);
  for (int64_t i = 0; i < m; i += edge)
    for (int64_t j = 0; j < (p.symmetric ? i + 1 : n); j += edge)
      kernels.product[int(p.a.kind)](p, i, std::min(i + edge, m), j, std::min(j + edge, n),
                                     aligned);
}

double plus(double x, bool diagonal, double gamma) { return x + (diagonal ? gamma : 0); }

// C = 2 AᵀB - D + 3 E + 5 I, everywhere it can be written to.
void check_general(const Kernels& kernels, Kind kind, const Size& s) {
  const bool wide = kind == Kind::kF64;
  const Kind full = wide ? Kind::kF64 : Kind::kF32;
  const Dense a = integers(s.k, s.m), b = integers(s.k, s.n), d = integers(s.m, s.n),
              e = integers(s.m, s.n);
  const Packed pa(kernels, kind, a), pb(kernels, kind, b), pe(kernels, kind, e);
  const Strided<float> added(d, false);
  const Results<double> results{Packed(kernels, kind, s.m, s.n), Packed(kernels, full, s.n, s.m),
                                Strided<double>(d, true)};
  Packed scaled(kernels, full, s.m, s.n), copy(kernels, full, s.m, s.n);
  Product p;
  p.a = pa.panels;
  p.b = pb.panels;
  p.alpha = 2;
  p.beta = -1;
  p.beta_panels = 3;
  p.gamma = 5;
  p.add = added.matrix;
  p.add_panels = pe.panels;
  p.scaled = scaled.panels;
  p.alpha2 = 0.5;
  p.gamma2 = 7;
  p.copy = copy.panels;
  results.go_to(p);
  run(kernels, p, 2);
  const Dense ab = product(a, b);
  const Dense c = dense(s.m, s.n, [&](int64_t i, int64_t j) {
    return plus(2 * ab(i, j) - d(i, j) + 3 * e(i, j), i == j, 5);
  });
  compare_results([&](const char* what) { return named("product, ", kind, s) + what; }, results, c);
  compare_packed(named("product, copy", kind, s), copy, c, 0);
  const Dense half =
      dense(s.m, s.n, [&](int64_t i, int64_t j) { return plus(0.5 * c(i, j), i == j, 7); });
  compare(named("product, scaled", kind, s), scaled, half, 0);
}

// C = AᵀA by its lower triangle.
void check_symmetric(const Kernels& kernels, Kind kind, const Size& s) {
  const Dense a = integers(s.k, s.m);
  const Packed pa(kernels, kind, a);
  Packed out(kernels, kind, s.m, s.m);
  Strided<float> store(integers(s.m, s.m), false);
  Product p;
  p.a = p.b = pa.panels;
  p.symmetric = true;
  p.out = out.panels;
  p.store = store.matrix;
  const Packed pt(kernels, kind, transposed(a));
  const Dense c = product(a, a);
  for (const Panels& a_t : {Panels{}, pt.panels}) {
    p.a_t = a_t;
    run(kernels, p, 2);
    compare_packed(named("symmetric, out", kind, s), out, c, 0);
    compare(named("symmetric, store", kind, s), store, c, 0);
  }
}

// The same of bf16 rows that are read where they are, NaN between them: an odd or an even distance
// apart, the result as fp32 or as bf16 numbers.
template <class T>
void check_rows(const Kernels& kernels, const Size& s, int64_t stride) {
  const Dense a = integers(s.k, s.m, sizeof(T) == 2 ? 1 : 4);
  std::vector<uint16_t> rows(size_t(s.m * stride), uint16_t(0xffff));
  for (int64_t i = 0; i < s.m; i++)
    for (int64_t j = 0; j < s.k; j++) {
      const float value = float(a(j, i));
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      rows[size_t(i * stride + j)] = uint16_t(bits >> 16);
    }
  Strided<float> store(integers(s.m, s.m), false);
  std::vector<uint16_t> halves(size_t(s.m * (s.m + 1)), uint16_t(0xffff));
  Product p;
  p.rows = {rows.data(), s.m, s.k, stride, 1, DType::kBF16};
  p.a = p.b = {nullptr, s.k, s.m, Kind::kBF16, 0};
  p.symmetric = true;
  p.store = store.matrix;
  if constexpr (sizeof(T) == 2) p.store = {halves.data(), s.m, s.m, s.m + 1, 1, DType::kBF16};
  check(kernels.reads_rows(p), named("rows are read", Kind::kBF16, s));
  const Dense c = product(a, a);
  for (int64_t edge : {1, 3, 12}) {
    run(kernels, p, edge);
    if constexpr (sizeof(T) == 4) {
      compare(named("symmetric, rows", Kind::kBF16, s), store, c, 0);
      check(store.margins_are_whole(), named("symmetric, around the result", Kind::kBF16, s));
    } else {
      const auto stored = [&](int64_t i, int64_t j) {
        return double(number(uint32_t(halves[size_t(i * (s.m + 1) + j)]) << 16));
      };
      Dense wanted = c;
      for (double& x : wanted.values) x = rounded(x, Kind::kBF16);
      compare(named("symmetric, rows, halves", Kind::kBF16, s), stored, wanted, 0);
      bool whole = true;
      for (int64_t i = 0; i < s.m; i++) whole = whole && std::isnan(stored(i, s.m));
      check(whole, named("symmetric, around the halves", Kind::kBF16, s));
    }
  }
  p.rows = p.rows.transposed();
  check(!kernels.reads_rows(p), named("columns are not read", Kind::kBF16, s));
}

bool in(Triangle shape, int64_t i, int64_t j) {
  return shape == Triangle::kNone || (shape == Triangle::kUpper ? i <= j : i >= j);
}

// Triangular operands. Blocks on their zero side are NaN: they must not be read.
void check_triangles(const Kernels& kernels, Kind kind, int64_t n) {
  const int64_t P = kernels.panel[int(kind)];
  const Triangle shapes[] = {Triangle::kNone, Triangle::kUpper, Triangle::kLower};
  for (Triangle a_shape : shapes)
    for (Triangle b_shape : shapes) {
      const auto cut = [&](Triangle shape) {
        const Dense x = integers(n, n);
        return dense(n, n, [&](int64_t i, int64_t j) { return in(shape, i, j) ? x(i, j) : 0.0; });
      };
      const auto poisoned = [&](Triangle shape, const Dense& x) {
        return dense(n, n, [&](int64_t i, int64_t j) {
          return in(shape, i / P, j / P) ? x(i, j) : std::numeric_limits<double>::quiet_NaN();
        });
      };
      const Dense a = cut(a_shape), b = cut(b_shape);
      const Dense whole = poisoned(a_shape, a);
      const Packed pa(kernels, kind, whole), pt(kernels, kind, transposed(whole)),
          pb(kernels, kind, poisoned(b_shape, b));
      Packed out(kernels, kind == Kind::kF64 ? kind : Kind::kF32, n, n);
      Product p;
      p.a = pa.panels;
      p.b = pb.panels;
      p.a_shape = a_shape;
      p.b_shape = b_shape;
      p.out = out.panels;
      for (const Panels& a_t : {Panels{}, pt.panels}) {
        p.a_t = a_t;
        run(kernels, p, 3);
        compare_packed(named("triangles", kind, {n, n, n}), out, product(a, b), 0);
      }
    }
}

// What a Newton-Schulz step multiplies: all results in pairs, and what is added.
void check_pairs(const Kernels& kernels, const Size& s) {
  const Dense a = integers(s.k, s.m), b = integers(s.k, s.n), e = integers(s.m, s.n);
  const Packed pa(kernels, Kind::kBF16, a), pb(kernels, Kind::kBF16, b),
      pe(kernels, Kind::kBF16, e);
  Packed out(kernels, Kind::kBF16, s.m, s.n), out_t(kernels, Kind::kBF16, s.n, s.m);
  Product p;
  p.a = pa.panels;
  p.b = pb.panels;
  p.alpha = 2;
  p.beta_panels = 3;
  p.add_panels = pe.panels;
  p.out = out.panels;
  p.out_t = out_t.panels;
  run(kernels, p, 3);
  const Dense ab = product(a, b);
  const Dense c = dense(s.m, s.n, [&](int64_t i, int64_t j) { return 2 * ab(i, j) + 3 * e(i, j); });
  compare_packed(named("pairs, out", Kind::kBF16, s), out, c, 0);
  compare_packed(named("pairs, out_t", Kind::kBF16, s), out_t, transposed(c), 0);
  Packed alone(kernels, Kind::kBF16, s.n, s.m);
  p.out = {};
  p.out_t = alone.panels;
  run(kernels, p, 2);
  compare_packed(named("pairs, out_t alone", Kind::kBF16, s), alone, transposed(c), 0);

  // Of one matrix, where the lower triangle is all that is multiplied.
  const Dense half = integers(s.m, s.m);
  const Dense r =
      dense(s.m, s.m, [&](int64_t i, int64_t j) { return half(std::max(i, j), std::min(i, j)); });
  const Packed pr(kernels, Kind::kBF16, r);
  Packed square(kernels, Kind::kBF16, s.m, s.m), square_t(kernels, Kind::kBF16, s.m, s.m);
  p = {};
  p.a = p.b = p.add_panels = pr.panels;
  p.symmetric = true;
  p.beta_panels = -1;
  p.out = square.panels;
  run(kernels, p, 3);
  const Dense rr = product(r, r);
  const Dense wanted = dense(s.m, s.m, [&](int64_t i, int64_t j) { return rr(i, j) - r(i, j); });
  compare_packed(named("pairs, symmetric", Kind::kBF16, s), square, wanted, 0);
  if (!pr.panels.left) return;
  Panels only = square_t.panels;  // the image is all there is
  only.data = nullptr;
  p.out = only;
  run(kernels, p, 3);
  check(std::memcmp(square_t.panels.left, square.panels.left,
                    size_t(ceil_div(s.m, 32) * ceil_div(s.m, 32) * 512) * 4) == 0,
        named("pairs, the image alone", Kind::kBF16, s));
}

// Real numbers: within the rounding of a sum of k terms, and the same bits however it is cut.
void check_rounding(const Kernels& kernels, Kind kind, const Size& s) {
  Dense a = gaussian(s.k, s.m), b = gaussian(s.k, s.n);
  for (Dense* x : {&a, &b})
    for (double& value : x->values) value = rounded(value, kind);
  const Packed pa(kernels, kind, a), pb(kernels, kind, b);
  const Kind full = kind == Kind::kF64 ? Kind::kF64 : Kind::kF32;
  const Packed pt(kernels, kind, transposed(a));
  const auto result = [&](int64_t edge, const Panels& a_t = {}) {
    Packed out(kernels, full, s.m, s.n);
    Product p;
    p.a = pa.panels;
    p.a_t = a_t;
    p.b = pb.panels;
    p.out = out.panels;
    run(kernels, p, edge);
    return dense(s.m, s.n, [&](int64_t i, int64_t j) { return out(i, j); });
  };
  const Dense whole = result(6), exact = product(a, b);
  check(whole.values == result(1).values, named("the same bits block by block", kind, s));
  check(whole.values == result(4, pt.panels).values, named("the same bits from A^T", kind, s));
  const double unit = full == Kind::kF64 ? 1.1e-16 : 6e-8;
  compare(named("rounding", kind, s), whole, exact, 32 * unit * std::sqrt(double(s.k)));
}

double length_of_column(const Dense& x, int64_t j) {
  double sum = 0;
  for (int64_t i = 0; i < x.rows; i++) sum += x(i, j) * x(i, j);
  return std::sqrt(sum);
}

// AᵀB of fp32 numbers, from A alone and with Aᵀ beside it: judge(result).
template <class Judge>
void with_and_without_transpose(const Kernels& kernels, const Dense& a, const Dense& b,
                                const Judge& judge) {
  const Packed pa(kernels, Kind::kF32, a), pt(kernels, Kind::kF32, transposed(a)),
      pb(kernels, Kind::kF32, b);
  Packed out(kernels, Kind::kF32, a.cols, b.cols);
  Product p;
  p.a = pa.panels;
  p.b = pb.panels;
  p.out = out.panels;
  for (const Panels& a_t : {Panels{}, pt.panels}) {
    p.a_t = a_t;
    run(kernels, p, 3);
    judge(out);
  }
}

// Columns of all magnitudes that the format has, side by side: the error of an element is small
// beside the lengths of its two columns, wherever these are beside the others'.
void check_scales(const Kernels& kernels, const Size& s) {
  Dense a = gaussian(s.k, s.m), b = gaussian(s.k, s.n);
  const int exponents[] = {0, -60, 100, -120, 3, -145, 60, -30, 120};
  const auto spread = [&](Dense& x, int64_t first) {
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t j = 0; j < x.cols; j++)
        x(i, j) = double(float(std::ldexp(x(i, j), exponents[(j + first) % 9])));
  };
  spread(a, 0);
  spread(b, 5);
  // A column in which one element stands far above the others.
  for (int64_t i = 1; i < s.k; i++) a(i, 0) = std::ldexp(a(i, 0), -60);
  const Dense exact = product(a, b);
  with_and_without_transpose(kernels, a, b, [&](const Packed& out) {
    double worst = 0;
    for (int64_t i = 0; i < s.m; i++)
      for (int64_t j = 0; j < s.n; j++) {
        const double scale = length_of_column(a, i) * length_of_column(b, j);
        if (scale < 0x1p-90 || scale > 0x1p+120) continue;
        const double error = std::abs(out(i, j) - exact(i, j)) / scale;
        worst = error <= worst ? worst : error;  // NaN counts
      }
    check(worst < 1e-6, named("scales", Kind::kF32, s) + ": " + std::to_string(worst));
  });
}

// What is not finite stays so, and where it was.
void check_nonfinite(const Kernels& kernels, const Size& s) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double value : {std::nan(""), kInfinity, -kInfinity}) {
    Dense a = integers(s.k, s.m), b = integers(s.k, s.n);
    a(s.k / 2, s.m - 1) = value;
    b(s.k - 1, 0) = value;
    const Dense exact = product(a, b);
    with_and_without_transpose(kernels, a, b, [&](const Packed& out) {
      bool same = true;
      for (int64_t i = 0; i < s.m; i++)
        for (int64_t j = 0; j < s.n; j++)
          same = same &&
                 (out(i, j) == exact(i, j) || (std::isnan(out(i, j)) && std::isnan(exact(i, j))));
      check(same, named("not finite", Kind::kF32, s));
    });
  }
}

// C = A B where the matrices lie, in two parts, and nothing around them.
template <class T>
void check_in_place(const Kernels& kernels, const Size& s) {
  const Kind kind = sizeof(T) == 8 ? Kind::kF64 : Kind::kF32;
  const Dense a = integers(s.m, s.k), b = integers(s.k, s.n), expected = product(transposed(a), b);
  for (const bool columns_first : {false, true}) {
    const Strided<T> of_a(a, columns_first), of_b(b, false), c(Dense(s.m, s.n), false);
    const InPlace in_place{of_a.matrix, of_b.matrix, c.matrix};
    const auto kernel = kernels.multiply_in_place[kind == Kind::kF64];
    kernel(in_place, s.m / 2, s.m);
    kernel(in_place, 0, s.m / 2);
    compare(named("in place", kind, s), c, expected, 0);
    check(c.margins_are_whole(), named("around in place", kind, s));
  }
}

}  // namespace

void check_products(const Kernels& kernels, Kind kind) {
  if (kernels.product[int(kind)] == nullptr) return;
  const int64_t P = kernels.panel[int(kind)];
  const Size sizes[] = {{1, 1, 1},
                        {P, P, 32},
                        {P - 1, P + 1, 31},
                        {2 * P + 3, 17, 33},
                        {5, 3 * P, 2},
                        {P + 16, P + 15, 385},
                        {3 * P + 5, P, 96},
                        {3 * P + 1, 2, 770},
                        {2 * P, 2 * P, 1537},
                        {6 * P, 6 * P, 95},
                        {7 * P + 7, 8 * P - 3, 193},
                        {12 * P + 3, 5, 192}};
  for (const Size& s : sizes) {
    check_general(kernels, kind, s);
    check_symmetric(kernels, kind, s);
    check_rounding(kernels, kind, s);
    for (int64_t gap = 2; gap < 4 && kind == Kind::kBF16 && kernels.reads_rows != nullptr; gap++) {
      check_rows<float>(kernels, s, s.k + gap);
      check_rows<uint16_t>(kernels, s, s.k + gap);
    }
    if (kind == Kind::kBF16) check_pairs(kernels, s);
  }
  for (int64_t n : {P, 5 * P, 13 * P + 5}) check_triangles(kernels, kind, n);
  if (kind == Kind::kF32)
    for (const Size& s :
         {Size{P, P, 40}, Size{6 * P, 5 * P, 64}, Size{5 * P + 9, 7 * P - 5, 241}}) {
      check_scales(kernels, s);
      check_nonfinite(kernels, s);
    }
  // A product without memory takes this much of the stack.
  check(kernels.jobs[int(kind)].scratch_bytes(1) <= (80 << 10), "scratch memory of one block");
  check(kernels.multiply_adds[int(kind)](3) > 0, "multiply_adds counts its operations");
}

// A sum of thousands of terms, in fp32, is as exact as one of some hundreds: it is made of the sums
// of stretches.
void check_long_sums(const Kernels& kernels, Kind kind) {
  if (kernels.product[int(kind)] == nullptr) return;
  const Size s{320, 320, 6144};  // parts of fp32 numbers pay here
  Dense a = gaussian(s.k, s.m);
  for (double& value : a.values) value = rounded(value, kind);
  const Packed pa(kernels, kind, a);
  Packed out(kernels, Kind::kF32, s.m, s.n);
  Product p;
  p.a = p.b = pa.panels;
  p.symmetric = true;
  p.out = out.panels;
  run(kernels, p, 6);
  const Dense exact = product(a, a);
  double error = 0, length = 0;
  for (int64_t i = 0; i < s.m; i++)
    for (int64_t j = 0; j < i; j++) {
      error += std::pow(out(i, j) - exact(i, j), 2);
      length += std::pow(exact(i, j), 2);
    }
  const double relative = std::sqrt(error / length);
  char what[128];
  std::snprintf(what, sizeof what, "a relative error of %.2g", relative);
  check(relative < 5e-7, named(what, kind, s));
}

void check_products_in_place(const Kernels& kernels) {
  for (const Size& s : {Size{1, 1, 1}, Size{8, 32, 16}, Size{7, 15, 3}, Size{33, 50, 97},
                        Size{64, 24, 129}, Size{20, 113, 193}, Size{9, 5, 500}}) {
    check_in_place<float>(kernels, s);
    check_in_place<double>(kernels, s);
  }
}

}  // namespace spectral_kernels::cpu
