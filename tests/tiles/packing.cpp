// Packing, combinations, scalings and sums against plain loops.
#include "programs.h"

namespace spectral_kernels::cpu {
namespace {

struct Shape {
  int64_t m, n;
};

// Two by two panels and a bit, and what is smaller than one.
std::vector<Shape> shapes(int64_t P) {
  return {{1, 1}, {3, P + 1}, {P, P}, {2 * P + 3, 2 * P - 1}, {P - 1, 2}};
}

std::string named(const char* what, Kind kind, const Shape& s) {
  static const char* const kNames[] = {"f32", "f64", "bf16"};
  return std::string(what) + " " + kNames[int(kind)] + " " + std::to_string(s.m) + "x" +
         std::to_string(s.n);
}

void run(const Kernels& kernels, const Pack& p, Kind kind) {
  kernels.pack[int(kind)](p, 0, ceil_div(p.x.rows, kernels.panel[int(kind)]));
}

template <class T>
void check_pack(const Kernels& kernels, Kind kind, const Shape& s, bool columns_first) {
  const Dense x = integers(s.m, s.n);
  const Strided<T> source(x, columns_first);
  Packed out(kernels, kind, s.m, s.n), out_t(kernels, kind, s.n, s.m);
  Pack p;
  p.x = source.matrix;
  p.shift = 3;
  p.out = out.panels;
  p.out_t = out_t.panels;
  run(kernels, p, kind);
  const Dense shifted = dense(s.m, s.n, [&](int64_t i, int64_t j) { return 8 * x(i, j); });
  compare_packed(named("pack, out", kind, s), out, shifted, 0);
  compare_packed(named("pack, out_t", kind, s), out_t, transposed(shifted), 0);

  // M <- M / 2 - X / 2, packed is M / 2 - X / 2 of the new M.
  const Dense m = integers(s.m, s.n);
  Strided<T> momentum(m, !columns_first);
  Packed mixed(kernels, kind, s.m, s.n);
  p.shift = 0;
  p.momentum = momentum.matrix;
  p.beta = 0.5;
  p.nesterov = true;
  p.negate = true;
  p.out = mixed.panels;
  p.out_t = {};
  run(kernels, p, kind);
  const Dense next =
      dense(s.m, s.n, [&](int64_t i, int64_t j) { return 0.5 * m(i, j) - 0.5 * x(i, j); });
  const Dense mix =
      dense(s.m, s.n, [&](int64_t i, int64_t j) { return 0.5 * next(i, j) - 0.5 * x(i, j); });
  compare(named("pack, momentum", kind, s), momentum, next, 0);
  check(momentum.margins_are_whole(), named("pack, around the momentum", kind, s));
  compare_packed(named("pack, Nesterov", kind, s), mixed, mix, 0);
}

// Every bf16 and every half goes to the fp32 number that it stands for; fp32 numbers come back
// rounded to nearest.
void check_formats(const Kernels& kernels) {
  const int64_t n = 256;
  std::vector<uint16_t> words(size_t(n * n));
  for (size_t i = 0; i < words.size(); i++) words[i] = uint16_t(i);
  const auto half = [](uint16_t h) {
    const int exponent = (h >> 10) & 31, fraction = h & 1023;
    const double magnitude = exponent == 31  ? (fraction ? std::nan("") : HUGE_VAL)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
  };
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    Packed out(kernels, Kind::kF32, n, n);
    Pack p;
    p.x = {words.data(), n, n, n, 1, dtype};
    p.out = out.panels;
    run(kernels, p, Kind::kF32);
    std::vector<uint16_t> back(words.size());
    Combine c;
    c.a = out.panels;
    c.store = {back.data(), n, n, n, 1, dtype};
    kernels.combine[0](c, 0, ceil_div(n, kernels.panel[0]));
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < n; j++) {
        const uint16_t word = words[size_t(i * n + j)], returned = back[size_t(i * n + j)];
        const double wanted =
            dtype == DType::kF16 ? half(word) : double(number(uint32_t(word) << 16));
        const double got = out(i, j);
        if (std::isnan(wanted) ? !std::isnan(got) : got != wanted || returned != word) wrong++;
      }
    check(wrong == 0, dtype == DType::kF16 ? "halves" : "bf16 numbers");
  }
  const Dense x = gaussian(n, n);
  const Packed a(kernels, Kind::kF32, x);
  Combine c;
  c.a = a.panels;
  c.store = {words.data(), n, n, n, 1, DType::kBF16};
  kernels.combine[0](c, 0, ceil_div(n, kernels.panel[0]));
  int64_t wrong = 0;
  for (int64_t i = 0; i < n * n; i++) wrong += words[size_t(i)] != bf16(x.values[size_t(i)]);
  check(wrong == 0, "rounding to bf16");
}

void check_combine(const Kernels& kernels, Kind kind, const Shape& s) {
  const Kind other =
      kernels.panel[int(Kind::kBF16)] != 0 && kind == Kind::kF32 ? Kind::kBF16 : kind;
  const Dense a = integers(s.m, s.n), b = integers(s.m, s.n), d = integers(s.m, s.n);
  const Packed pa(kernels, kind, a), pb(kernels, other, b);
  const Strided<double> added(d, true);
  const Results<float> results{Packed(kernels, other, s.m, s.n), Packed(kernels, kind, s.n, s.m),
                               Strided<float>(d, false)};
  Combine c;
  c.a = pa.panels;
  c.b = pb.panels;
  c.alpha = 2;
  c.beta = -0.5;
  c.gamma = 3;
  c.delta = 4;
  c.add = added.matrix;
  results.go_to(c);
  kernels.combine[kind == Kind::kF64 ? 1 : 0](c, 0, ceil_div(s.n, kernels.panel[int(kind)]));
  const Dense sum = dense(s.m, s.n, [&](int64_t i, int64_t j) {
    return 2 * a(i, j) - 0.5 * b(i, j) + (i == j ? 3 : 0) + 4 * d(i, j);
  });
  compare_results([&](const char* what) { return named("combine, ", kind, s) + what; }, results,
                  sum);
}

void check_scale_and_sums(const Kernels& kernels, Kind kind, const Shape& s) {
  const int64_t blocks = ceil_div(s.n, kernels.panel[int(kind)]);
  const int wide = kind == Kind::kF64 ? 1 : 0;
  const Dense x = integers(s.m, s.n), y = integers(s.m, s.n), row = integers(s.m, 1),
              col = integers(s.n, 1), diagonal = integers(s.m, 1);
  const Packed px(kernels, kind, x), py(kernels, kind, y);
  for (const bool strict : {false, true}) {
    Packed out(kernels, kind, s.m, s.n);
    Scale scale;
    scale.x = px.panels;
    scale.out = out.panels;
    scale.row = row.values.data();
    scale.col = col.values.data();
    scale.diagonal = diagonal.values.data();
    scale.strict_upper = strict;
    kernels.scale[wide](scale, 0, blocks);
    compare(named("scale", kind, s), out,
            dense(s.m, s.n,
                  [&](int64_t i, int64_t j) {
                    return (strict && j <= i ? 0 : row(i, 0) * x(i, j) * col(j, 0)) +
                           (i == j ? diagonal(i, 0) : 0);
                  }),
            0);
  }
  std::vector<double> sums(size_t(s.n) + 1, 1e9);
  const auto compare_sums = [&](const char* what, ColumnSum sum, const Dense& expected) {
    kernels.column_sums[wide](sum, px.panels, py.panels, 0, blocks, sums.data());
    compare(named(what, kind, s), [&](int64_t, int64_t j) { return sums[size_t(j)]; }, expected, 0);
    check(sums.back() == 1e9, named("column sums, beyond the last", kind, s));
  };
  compare_sums("column sums, abs", ColumnSum::kAbs, dense(1, s.n, [&](int64_t, int64_t j) {
                 double sum = 0;
                 for (int64_t i = 0; i < s.m; i++) sum += std::fabs(x(i, j));
                 return sum;
               }));
  compare_sums("column sums, dot", ColumnSum::kDot, dense(1, s.n, [&](int64_t, int64_t j) {
                 double sum = 0;
                 for (int64_t i = 0; i < s.m; i++) sum += x(i, j) * y(i, j);
                 return sum;
               }));
}

void check_max_abs(const Kernels& kernels, const Shape& s) {
  Dense x = gaussian(s.m, s.n);
  double most = 0;
  for (int64_t j = 0; j < s.n; j++) most = std::fmax(most, std::fabs(x(s.m - 1, j)));
  for (const bool columns_first : {false, true}) {
    const Strided<float> narrow(x, columns_first);
    const Strided<double> wide(x, columns_first);
    const uint64_t low = kernels.max_abs_bits(narrow.matrix, s.m - 1, s.m),
                   high = kernels.max_abs_bits(wide.matrix, s.m - 1, s.m);
    double value;
    std::memcpy(&value, &high, sizeof value);
    check(double(number(uint32_t(low))) == most && value == most, "max_abs_bits of the last row");
  }
  x(s.m / 2, s.n / 2) = std::numeric_limits<double>::infinity();
  const Strided<float> infinite(x, false);
  check(kernels.max_abs_bits(infinite.matrix, 0, s.m) == 0x7f800000u, "max_abs_bits of infinity");
}

}  // namespace

void check_packing(const Kernels& kernels) {
  for (const Kind kind : {Kind::kF32, Kind::kF64, Kind::kBF16}) {
    const int64_t P = kernels.panel[int(kind)];
    if (P == 0) continue;
    for (const Shape& s : shapes(P)) {
      for (const bool columns_first : {false, true}) {
        check_pack<float>(kernels, kind, s, columns_first);
        check_pack<double>(kernels, kind, s, columns_first);
      }
      if (kind == Kind::kBF16) continue;
      check_combine(kernels, kind, s);
      check_scale_and_sums(kernels, kind, s);
      check_max_abs(kernels, s);
    }
  }
  check_formats(kernels);
}

}  // namespace spectral_kernels::cpu
