// Plain matrices, packed ones written by the definition in tiles.h, and the checks of this program.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/tiles.h"

namespace spectral_kernels::cpu {

inline int checks = 0, failures = 0;

inline void check(bool holds, const std::string& what) {
  checks++;
  if (holds) return;
  failures++;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
}

struct Dense {
  int64_t rows = 0, cols = 0;
  std::vector<double> values;
  Dense(int64_t rows_, int64_t cols_)
      : rows(rows_), cols(cols_), values(size_t(rows_ * cols_), 0.0) {}
  double& operator()(int64_t i, int64_t j) { return values[size_t(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return values[size_t(i * cols + j)]; }
};

template <class F>
Dense dense(int64_t rows, int64_t cols, const F& f) {
  Dense out(rows, cols);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) out(i, j) = f(i, j);
  return out;
}

inline std::mt19937& generator() {
  static std::mt19937 state(20261122);
  return state;
}

// Small integers: sums of their products are exact in fp32, and they are exact in 16 bits, so that
// results must match bit for bit in whatever order they are summed.
inline Dense integers(int64_t rows, int64_t cols, int most = 4) {
  std::uniform_int_distribution<int> draw(-most, most);
  return dense(rows, cols, [&](int64_t, int64_t) { return double(draw(generator())); });
}

inline Dense gaussian(int64_t rows, int64_t cols) {
  std::normal_distribution<float> draw;
  return dense(rows, cols, [&](int64_t, int64_t) { return double(draw(generator())); });
}

inline Dense transposed(const Dense& x) {
  return dense(x.cols, x.rows, [&](int64_t i, int64_t j) { return x(j, i); });
}

// Aᵀ B
inline Dense product(const Dense& a, const Dense& b) {
  return dense(a.cols, b.cols, [&](int64_t i, int64_t j) {
    long double sum = 0;  // the products under test may themselves be of doubles
    for (int64_t k = 0; k < a.rows; k++) sum += (long double)(a(k, i)) * b(k, j);
    return double(sum);
  });
}

inline uint32_t bits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}
inline float number(uint32_t x) {
  float out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// To nearest, ties to even; of a NaN, a NaN.
inline uint16_t bf16(double x) {
  const uint32_t u = bits(float(x));
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline double rounded(double x, Kind kind) {
  if (kind == Kind::kF64) return x;
  return kind == Kind::kF32 ? double(float(x)) : double(number(uint32_t(bf16(x)) << 16));
}

constexpr int64_t kMargin = 1024;  // words on both sides that nobody may read or write

// Whether packed bf16 matrices have left images too, where a set reads them.
inline bool with_images = false;

// A packed matrix in a buffer of its own, NaN where nothing was written.
class Packed {
 public:
  Packed(const Kernels& kernels, Kind kind, int64_t rows, int64_t cols)
      : P_(kernels.panel[int(kind)]),
        words_(kind == Kind::kBF16 ? ceil_div(rows, 2) : rows),
        size_(kind == Kind::kF64 ? 8 : 4),
        used_(ceil_div(cols, P_) * P_ * words_),
        buffer_(size_t((used_ + 2 * kMargin) * size_), char(0xff)) {
    panels = {buffer_.data() + kMargin * size_, rows, cols, kind, words_ * P_};
    const int64_t words = with_images ? kernels.image_words[int(kind)] : 0;
    if (words == 0) return;
    image_.assign(size_t(ceil_div(rows, P_) * ceil_div(cols, P_) * words + 2 * kMargin), ~0u);
    panels.left = image_.data() + kMargin;
  }
  Packed(const Kernels& kernels, Kind kind, const Dense& x)
      : Packed(kernels, kind, x.rows, x.cols) {
    std::memset(panels.data, 0, size_t(used_ * size_));
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t j = 0; j < x.cols; j++) set(i, j, x(i, j));
    uint32_t* word = image_.data() + kMargin;
    for_image([&](uint32_t wanted) { *word++ = wanted; });
  }

  double operator()(int64_t i, int64_t j) const {
    const int64_t at = index(i, j);
    if (panels.kind == Kind::kF64) return static_cast<const double*>(panels.data)[at];
    if (panels.kind == Kind::kF32) return double(static_cast<const float*>(panels.data)[at]);
    const uint32_t pair = static_cast<const uint32_t*>(panels.data)[at];
    return double(number(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u));
  }

  // Whether the columns beyond the matrix, and the missing row of the last pair, are zero.
  bool padding_is_zero() const {
    const int64_t width = ceil_div(panels.cols, P_) * P_;
    const int64_t height = panels.kind == Kind::kBF16 ? 2 * words_ : words_;
    for (int64_t i = 0; i < height; i++)
      for (int64_t j = i < panels.rows ? panels.cols : 0; j < width; j++)
        if ((*this)(i, j) != 0) return false;
    return true;
  }
  bool image_is_the_same() const {
    bool same = true;
    const uint32_t* word = image_.data() + kMargin;
    for_image([&](uint32_t wanted) { same = *word++ == wanted && same; });
    return same;
  }
  bool margins_are_whole() const {
    for (int64_t i = 0; i < (image_.empty() ? 0 : kMargin); i++)
      if (image_[size_t(i)] != ~0u || image_[image_.size() - 1 - size_t(i)] != ~0u) return false;
    for (int64_t i = 0; i < kMargin * size_; i++)
      if (buffer_[size_t(i)] != char(0xff) || buffer_[buffer_.size() - 1 - size_t(i)] != char(0xff))
        return false;
    return true;
  }

  Panels panels;

 private:
  int64_t index(int64_t i, int64_t j) const {
    return j / P_ * panels.stride + (panels.kind == Kind::kBF16 ? i / 2 : i) * P_ + j % P_;
  }
  // f(the pair that belongs there) for every word of the image: in tiles of 16 columns and 16
  // pairs.
  template <class F>
  void for_image(const F& f) const {
    if (image_.empty()) return;
    const auto* const pairs = static_cast<const uint32_t*>(panels.data);
    for (int64_t j0 = 0; j0 < panels.cols; j0 += P_)
      for (int64_t i0 = 0; i0 < panels.rows; i0 += P_)
        for (int64_t j = j0; j < j0 + P_; j++)
          for (int64_t i = i0; i < i0 + P_; i += 2) f(i < panels.rows ? pairs[index(i, j)] : 0);
  }
  void set(int64_t i, int64_t j, double value) {
    const int64_t at = index(i, j);
    if (panels.kind == Kind::kF64) {
      static_cast<double*>(panels.data)[at] = value;
    } else if (panels.kind == Kind::kF32) {
      static_cast<float*>(panels.data)[at] = float(value);
    } else {
      uint32_t& pair = static_cast<uint32_t*>(panels.data)[at];
      pair |= uint32_t(bf16(value)) << (i % 2 == 0 ? 0 : 16);
    }
  }

  int64_t P_, words_, size_, used_;
  std::vector<char> buffer_;
  std::vector<uint32_t> image_;
};

// A strided fp32 or fp64 matrix in a larger buffer of NaN.
template <class T>
class Strided {
 public:
  Strided(const Dense& x, bool columns_first) : buffer_(size_t((x.rows + 2) * (x.cols + 2)), kNaN) {
    const int64_t row = columns_first ? 1 : x.cols + 2, col = columns_first ? x.rows + 2 : 1;
    matrix = {buffer_.data() + row + col,
              x.rows,
              x.cols,
              row,
              col,
              sizeof(T) == 8 ? DType::kF64 : DType::kF32};
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t j = 0; j < x.cols; j++) at(i, j) = T(x(i, j));
  }
  double operator()(int64_t i, int64_t j) const {
    return double(
        static_cast<const T*>(matrix.data)[i * matrix.row_stride + j * matrix.col_stride]);
  }
  bool margins_are_whole() const {
    int64_t untouched = 0;
    for (const T& x : buffer_) untouched += std::isnan(x) ? 1 : 0;
    return untouched == int64_t(buffer_.size()) - matrix.rows * matrix.cols;
  }
  Matrix matrix;

 private:
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  T& at(int64_t i, int64_t j) {
    return static_cast<T*>(matrix.data)[i * matrix.row_stride + j * matrix.col_stride];
  }
  std::vector<T> buffer_;
};

// What a product or a combination writes three times: as it is, transposed, and to plain memory.
template <class T>
struct Results {
  Packed out, out_t;
  Strided<T> store;
  // A field of the same name of the work is where each goes.
  template <class Work>
  void go_to(Work& work) const {
    work.out = out.panels;
    work.out_t = out_t.panels;
    work.store = store.matrix;
  }
};

// Every element within `tolerance` of the expected one, relative to 1 and to it; 0: exactly it.
template <class M>
void compare(const std::string& what, const M& got, const Dense& expected, double tolerance) {
  for (int64_t i = 0; i < expected.rows; i++)
    for (int64_t j = 0; j < expected.cols; j++) {
      const double wanted = expected(i, j), off = std::fabs(got(i, j) - wanted);
      if (off <= tolerance * std::fmax(1, std::fabs(wanted))) continue;
      char where[128];
      std::snprintf(where, sizeof where, ": (%ld, %ld) is %.9g, not %.9g", long(i), long(j),
                    got(i, j), wanted);
      return check(false, what + where);
    }
  check(true, what);
}

// The same of a packed result, rounded to its kind, its padding and surroundings included.
inline void compare_packed(const std::string& what, const Packed& got, const Dense& expected,
                           double tolerance) {
  Dense wanted = expected;
  for (double& x : wanted.values) x = rounded(x, got.panels.kind);
  compare(what, got, wanted, tolerance);
  check(got.padding_is_zero(), what + ": the padding is zero");
  check(got.image_is_the_same(), what + ": the image");
  check(got.margins_are_whole(), what + ": nothing else is written");
}

// Of small integers: exactly so.
template <class Named, class T>
void compare_results(const Named& named, const Results<T>& got, const Dense& expected) {
  compare_packed(named("out"), got.out, expected, 0);
  compare_packed(named("out_t"), got.out_t, transposed(expected), 0);
  compare(named("store"), got.store, expected, 0);
  check(got.store.margins_are_whole(), named("around store"));
}

}  // namespace spectral_kernels::cpu
