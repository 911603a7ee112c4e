// Products of packed matrices, packing, and sums over packed matrices: block by block. See
// blocks.inl for how this is compiled.

#include "blocks.inl"
#include "register_tiles.inl"

// One P x P block of the product of two panels, rows k of a stretch of it. `next`, a panel or null,
// is on its way into L2 meanwhile.
template <class T, class E, bool kAdd>
static void block_product(int rows, int cols, bool lower, int64_t k, const E* a, const E* b, T* c,
                          const E* next = nullptr) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  for (int i = 0; i < rows;) {
    // Of a diagonal block only the vectors up to the diagonal are needed.
    const bool tall = i + kTallRows <= (lower ? kLanes : P) && cols <= (lower ? P : kLanes);
    const int past = i + (tall ? kTallRows : SK_MR);
    const int needed = lower && past < cols ? past : cols;
    const int vectors = (needed + kLanes - 1) / kLanes;
    if (SK_FETCH_AHEAD && next != nullptr)
      for (int64_t e = i * k; e < past * k; e += 64 / sizeof(E)) __builtin_prefetch(next + e, 0, 2);
    for (int v = 0; v < vectors; v += SK_NV)
      register_tiles<T, E, kAdd>(tall, vectors - v < SK_NV ? vectors - v : SK_NV, k, a + i,
                                 b + v * kLanes, c + i * P + v * kLanes);
    i = past;
  }
}

// ---------------------------------------------------------------- products

// c <- alpha c + beta d for the first `rows` rows of two blocks.
template <class T>
SK_INLINE void scale_add(int rows, T alpha, T* c, T beta, const T* d) {
  for (int i = 0; i < rows * Simd<T>::kPanel; i += Simd<T>::kLanes)
    store(c + i, alpha * load(c + i) + beta * load(d + i));
}
template <class T>
SK_INLINE void scale(int rows, T alpha, T* c) {
  for (int i = 0; i < rows * Simd<T>::kPanel; i += Simd<T>::kLanes)
    store(c + i, alpha * load(c + i));
}

// Panels that hold numbers as they are computed, and no image of them.
template <class T>
SK_INLINE bool is_plain(const Panels& p) {
  return p.kind == (sizeof(T) == 4 ? Kind::kF32 : Kind::kF64) && p.data && !p.left;
}

// Above the diagonal of a block, its first n rows and columns, what is below it.
template <class T>
SK_INLINE void mirror_lower(int n, T* c) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  typedef decltype(Vector<T>{} < Vector<T>{}) Mask;
  Mask lane;
  for (int l = 0; l < kLanes; l++) lane[l] = l;
  for (int i = 0; i < n; i += kLanes)
    for (int j = 0; j <= i; j += kLanes) {
      Vector<T> row[kLanes], old[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) old[r] = row[r] = load(c + (i + r) * P + j);
      Transpose<T>::template stage<kLanes / 2>(row);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++)
        store(c + (j + r) * P + i, i == j ? (lane > r ? row[r] : old[r]) : row[r]);
    }
}

// What most products of an iteration want of a block: alpha C + beta E as panels, and its mirror or
// transpose, without a copy between. False, with nothing done, where more is wanted or where rows
// or columns end within a vector.
template <class T>
SK_INLINE bool finish_plainly(const Product& p, int64_t bi, int64_t bj, int rows, int cols,
                              const T* c) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  const bool diagonal = bi == bj;
  if (!is_plain<T>(p.out) || p.copy || p.store || p.scaled || p.beta != 0 ||
      (p.gamma != 0 && diagonal) || rows % kLanes != 0 || cols % kLanes != 0)
    return false;
  if (p.out_t && (p.symmetric || !is_plain<T>(p.out_t))) return false;
  if (p.beta_panels != 0 && !is_plain<T>(p.add_panels)) return false;
  T* const to = panel_block<T>(p.out, bi, bj);
  const T alpha = T(p.alpha);
  if (p.beta_panels != 0) {
    const T beta = T(p.beta_panels);
    const T* const d = panel_block<T>(p.add_panels, bi, bj);
    for (int i = 0; i < rows * P; i += kLanes)
      store(to + i, alpha * load(c + i) + beta * load(d + i));
  } else {
    for (int i = 0; i < rows * P; i += kLanes) store(to + i, alpha * load(c + i));
  }
  if (p.symmetric && diagonal)
    mirror_lower(rows, to);
  else if (p.symmetric || p.out_t)
    transpose_rows(rows, cols, to, panel_block<T>(p.symmetric ? p.out : p.out_t, bj, bi));
  return true;
}

template <class T>
static void finish_block(const Product& p, int64_t bi, int64_t bj, int rows, int cols, T* c) {
  if (finish_plainly<T>(p, bi, bj, rows, cols, c)) return;
  constexpr int P = Simd<T>::kPanel;
  constexpr Kind kNative = sizeof(T) == 4 ? Kind::kF32 : Kind::kF64;
  alignas(64) Block<T> other;  // first D or E, later the transposed block
  const bool diagonal = bi == bj, mirror = p.symmetric && !diagonal;
  const T alpha = T(p.alpha);
  if (p.beta_panels != 0 && p.add_panels.kind == kNative) {
    scale_add(rows, alpha, c, T(p.beta_panels), panel_block<T>(p.add_panels, bi, bj));
  } else if (p.beta_panels != 0) {
    load_panel(p.add_panels, bi, bj, rows, other);
    scale_add(rows, alpha, c, T(p.beta_panels), other);
  } else if (p.alpha != 1) {
    scale(rows, alpha, c);
  }
  if (p.beta != 0) {
    load_block(p.add, bi * P, bj * P, rows, cols, other);
    scale_add(rows, T(1), c, T(p.beta), other);
  }
  if (p.gamma != 0 && diagonal)
    for (int i = 0; i < rows && i < cols; i++) c[i * P + i] += T(p.gamma);
  if (p.symmetric && diagonal) mirror_lower(P, c);
  const bool both = mirror || p.out_t;
  if (both) transpose_block(c, other);
  const T* const transposed = p.symmetric && diagonal ? c : both ? other : nullptr;
  if (p.out) {
    store_panel(p.out, bi, bj, rows, c, transposed);
    if (mirror) store_panel(p.out, bj, bi, cols, other, c);
  }
  if (p.copy) {
    store_panel(p.copy, bi, bj, rows, c, transposed);
    if (mirror) store_panel(p.copy, bj, bi, cols, other, c);
  }
  if (p.out_t) store_panel(p.out_t, bj, bi, cols, other, c);
  if (p.store) {
    store_block(p.store, bi * P, bj * P, rows, cols, c);
    if (mirror) store_block(p.store, bj * P, bi * P, cols, rows, other);
  }
  if (p.scaled) {
    scale(P, T(p.alpha2), c);
    if (diagonal)
      for (int i = 0; i < rows; i++) c[i * P + i] += T(p.gamma2);
    if (mirror) scale(P, T(p.alpha2), other);
    store_panel(p.scaled, bi, bj, rows, c, p.symmetric ? transposed : nullptr);
    if (mirror) store_panel(p.scaled, bj, bi, cols, other, c);
  }
}

struct Range {
  int64_t begin, end;
};

// Of the rows [begin, end) of a panel whose columns are [j, j + width), those that can be non-zero.
template <bool kPairs>
SK_INLINE Range nonzero_rows(Triangle shape, int64_t j, int64_t width, int64_t begin, int64_t end) {
  const int64_t first = kPairs ? j / 2 : j, past = kPairs ? (j + width + 1) / 2 : j + width;
  if (shape == Triangle::kUpper && past < end) end = past;
  if (shape == Triangle::kLower && first > begin) begin = first;
  return {begin, end};
}

// Rows of a panel that are multiplied before the accumulators go to memory, at most. Stretches of k
// are equal and depend on k alone, so every element is summed in the same order whatever the tiles
// and threads.
constexpr int64_t kBlockK = SK_BLOCK_K;
SK_INLINE int64_t stretch_of(int64_t k) {
  return k > 0 ? ceil_div(k, ceil_div(k, kBlockK)) : kBlockK;
}

template <class T, class E>
static void product_blocks(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                           void* scratch) {
  constexpr int P = Simd<T>::kPanel;
  constexpr bool kPairs = sizeof(T) == 4 && __is_same(E, uint32_t);
  const int64_t m = p.a.cols, n = p.b.cols;
  const int64_t k_rows = kPairs ? (p.a.rows + 1) / 2 : p.a.rows;
  const int64_t stretch = stretch_of(k_rows);
  const int64_t stretches = k_rows > 0 ? ceil_div(k_rows, stretch) : 1;
  // Smaller operands are in L2 from when they were packed.
  const bool far = (m + n) * k_rows * int64_t(sizeof(E)) > (256 << 10);
  T* tile = static_cast<T*>(scratch);
  for (int64_t s = 0; s < stretches; s++) {
    const int64_t k0 = s * stretch, k1 = k0 + stretch < k_rows ? k0 + stretch : k_rows;
    const bool first = s == 0, last = s == stretches - 1;
    for (int64_t bj = j0; bj < j1; bj++) {
      const int cols = int(n - bj * P < P ? n - bj * P : P);
      const Range of_b = nonzero_rows<kPairs>(p.b_shape, bj * P, P, k0, k1);
      for (int64_t bi = p.symmetric && bj > i0 ? bj : i0; bi < i1; bi++) {
        const int rows = int(m - bi * P < P ? m - bi * P : P);
        const bool lower = p.symmetric && bi == bj;
        // With one stretch the block never leaves L1; with more it waits in the tile buffer.
        T* c = stretches == 1 ? tile : tile + ((bi - i0) * (j1 - j0) + (bj - j0)) * P * P;
        const Range k = nonzero_rows<kPairs>(p.a_shape, bi * P, P, of_b.begin, of_b.end);
        const int64_t count = k.end > k.begin ? k.end - k.begin : 0;
        const E* a = static_cast<const E*>(p.a.data) + bi * p.a.stride + k.begin * P;
        const E* b = static_cast<const E*>(p.b.data) + bj * p.b.stride + k.begin * P;
        // Every panel is read for the first time in the first column or at the end of one.
        const E* next = far && bj == j0 && bi + 1 < i1       ? a + p.a.stride
                        : far && bi + 1 == i1 && bj + 1 < j1 ? b + p.b.stride
                                                             : nullptr;
        if (first) {
          if (rows < P || cols < P || lower) clear_block(c);
          block_product<T, E, false>(rows, cols, lower, count, a, b, c, next);
        } else if (count > 0) {
          block_product<T, E, true>(rows, cols, lower, count, a, b, c, next);
        }
        if (last) finish_block<T>(p, bi, bj, rows, cols, c);
      }
    }
  }
}

// ---------------------------------------------------------------- products in place

// The rows of A, as far as they go, times `cols` columns of B, which were copied to `panel`.
template <class T, bool kAdd>
static void panel_in_place(const Matrix& a, const T* panel, int cols, T* c, int64_t c_pitch) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  const int vectors = (cols + kLanes - 1) / kLanes;
  const size_t bytes = size_t(cols) * sizeof(T);
  alignas(64) T own[SK_MR * P];  // where what lies beyond the last column is not ours to write
  for (int64_t i = 0; i < a.rows; i += SK_MR, c += SK_MR * c_pitch) {
    const int rows = int(a.rows - i < SK_MR ? a.rows - i : SK_MR);
    const T* from = static_cast<const T*>(a.data) + i * a.row_stride;
    int64_t offset[SK_MR];
    for (int r = 0; r < SK_MR; r++)  // rows that are not there are the last one again
      offset[r] = (r < rows ? r : rows - 1) * a.row_stride;
    const bool whole = cols % kLanes == 0;
    T* const to = whole ? c : own;
    const int64_t pitch = whole ? c_pitch : P;
    for (int r = 0; r < rows && !whole && kAdd; r++)
      __builtin_memcpy(own + r * P, c + r * c_pitch, bytes);
    for (int v = 0; v < vectors; v += SK_NV)
      tiles_in_place<T, kAdd>(vectors - v < SK_NV ? vectors - v : SK_NV, a.cols, from, offset,
                              a.col_stride, panel + v * kLanes, rows, to + v * kLanes, pitch);
    for (int r = 0; r < rows && !whole; r++) __builtin_memcpy(c + r * c_pitch, own + r * P, bytes);
  }
}

// Summed in the order of product_blocks.
template <class T>
static void multiply_in_place(const InPlace& p, int64_t r0, int64_t r1) {
  constexpr int P = Simd<T>::kPanel;
  const int64_t n = p.b.cols, k = p.a.cols, stretch = stretch_of(k);
  alignas(64) T panel[kBlockK * P];  // of B, whose rows may be too far apart to stay in L1
  Matrix a = p.a;
  a.rows = r1 - r0;
  for (int64_t k0 = 0; k0 < k; k0 += stretch) {
    a.data = static_cast<T*>(p.a.data) + r0 * a.row_stride + k0 * a.col_stride;
    a.cols = k - k0 < stretch ? k - k0 : stretch;
    for (int64_t j = 0; j < n; j += P) {
      const int cols = int(n - j < P ? n - j : P);
      const T* from = static_cast<const T*>(p.b.data) + k0 * p.b.row_stride + j;
      if (cols < P) __builtin_memset(panel, 0, size_t(a.cols) * P * sizeof(T));
      for (int64_t i = 0; i < a.cols; i++, from += p.b.row_stride) {
        prefetch<P * sizeof(T)>(from + P);
        get_row(from, cols, panel + i * P);
      }
      T* const c = static_cast<T*>(p.c.data) + r0 * p.c.row_stride + j;
      if (k0 == 0)
        panel_in_place<T, false>(a, panel, cols, c, p.c.row_stride);
      else
        panel_in_place<T, true>(a, panel, cols, c, p.c.row_stride);
    }
  }
}

// ---------------------------------------------------------------- packing

template <class T>
SK_INLINE T power_of_two(int e) {
  if constexpr (sizeof(T) == 4)
    return float_of(uint32_t(e + 127) << 23);
  else
    return __builtin_bit_cast(double, uint64_t(e + 1023) << 52);
}

// The pairs of Xᵀ are words of a row-major bf16 X as they stand: transposed, not converted.
static void pack_words(const Pack& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<float>::kPanel, kWord = sizeof(uint32_t);
  const int64_t words = ceil_div(p.x.cols, int64_t(2));
  alignas(64) Block<float> x, transposed;
  for (int64_t bi = i0; bi < i1; bi++) {
    const int rows = int(p.x.rows - bi * P < P ? p.x.rows - bi * P : P);
    const BF16* base = static_cast<const BF16*>(p.x.data) + bi * P * p.x.row_stride;
    uint32_t* out = pair_block(p.out_t, 0, bi);
    for (int64_t w = 0; w < words; w += P) {
      const int count = int(words - w < P ? words - w : P);
      const int64_t bytes = (p.x.cols - 2 * w < 2 * P ? p.x.cols - 2 * w : 2 * P) * 2;
      if (rows < P || bytes < P * kWord) clear_block(x);
      for (int i = 0; i < rows; i++) {
        const BF16* row = base + i * p.x.row_stride + 2 * w;
        prefetch<P * kWord>(row + 2 * P);
        if (bytes == P * kWord)
          __builtin_memcpy(x + i * P, row, P * kWord);
        else
          __builtin_memcpy(x + i * P, row, size_t(bytes));
      }
      transpose_block(x, transposed);
      __builtin_memcpy(out + w * P, transposed, size_t(count) * P * kWord);
    }
  }
}

template <class T>
static void pack_blocks(const Pack& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  if constexpr (sizeof(T) == 4)
    if (p.x.dtype == DType::kBF16 && p.x.col_stride == 1 && p.out_t && !p.out &&
        p.out_t.kind == Kind::kBF16 && !p.momentum && !p.negate && p.shift == 0)
      return pack_words(p, i0, i1);
  const int64_t column_blocks = ceil_div(p.x.cols, int64_t(P));
  // Two factors, since 2^149 and 2^1074, which bring the smallest numbers up to 1, are not finite.
  const T first = power_of_two<T>(p.shift / 2), second = power_of_two<T>(p.shift - p.shift / 2);
  alignas(64) Block<T> x, other;
  for (int64_t bi = i0; bi < i1; bi++) {
    const int rows = int(p.x.rows - bi * P < P ? p.x.rows - bi * P : P);
    for (int64_t bj = 0; bj < column_blocks; bj++) {
      const int cols = int(p.x.cols - bj * P < P ? p.x.cols - bj * P : P);
      load_block(p.x, bi * P, bj * P, rows, cols, x);
      if (p.momentum) {
        load_block(p.momentum, bi * P, bj * P, rows, cols, other);
        const T keep = T(p.beta), add = T(p.negate ? p.beta - 1 : 1 - p.beta);
        for (int i = 0; i < P * P; i += kLanes) {
          const Vector<T> g = load(x + i), m = keep * load(other + i) + add * g;
          store(other + i, m);
          store(x + i, p.nesterov ? add * g + keep * m : m);
        }
        store_block(p.momentum, bi * P, bj * P, rows, cols, other);
      } else if (p.negate) {
        for (int i = 0; i < P * P; i += kLanes) store(x + i, -load(x + i));
      }
      if (p.shift != 0)
        for (int i = 0; i < P * P; i += kLanes) store(x + i, first * load(x + i) * second);
      if (p.out_t) transpose_block(x, other);
      if (p.out) store_panel(p.out, bi, bj, rows, x, p.out_t ? other : nullptr);
      if (p.out_t) store_panel(p.out_t, bj, bi, cols, other, x);
    }
  }
}

// ---------------------------------------------------------------- elementwise and sums

template <class T>
static void combine_blocks(const Combine& p, int64_t j0, int64_t j1) {
  constexpr int P = Simd<T>::kPanel;
  const Panels& shape = p.a ? p.a : p.out;
  const int64_t row_blocks = ceil_div(shape.rows, int64_t(P));
  alignas(64) Block<T> a, b;
  for (int64_t bj = j0; bj < j1; bj++) {
    const int cols = int(shape.cols - bj * P < P ? shape.cols - bj * P : P);
    for (int64_t bi = 0; bi < row_blocks; bi++) {
      const int rows = int(shape.rows - bi * P < P ? shape.rows - bi * P : P);
      if (p.a)
        load_panel(p.a, bi, bj, rows, a);
      else
        clear_block(a);
      if (p.b) {
        load_panel(p.b, bi, bj, rows, b);
        scale_add(P, T(p.alpha), a, T(p.beta), b);
      } else if (p.alpha != 1) {
        scale(P, T(p.alpha), a);
      }
      if (p.gamma != 0 && bi == bj)
        for (int i = 0; i < rows && i < cols; i++) a[i * P + i] += T(p.gamma);
      if (p.delta != 0) {
        load_block(p.add, bi * P, bj * P, rows, cols, b);
        scale_add(P, T(1), a, T(p.delta), b);
      }
      if (p.out_t) transpose_block(a, b);
      if (p.out) store_panel(p.out, bi, bj, rows, a, p.out_t ? b : nullptr);
      if (p.store) store_block(p.store, bi * P, bj * P, rows, cols, a);
      if (p.out_t) store_panel(p.out_t, bj, bi, cols, b, a);
    }
  }
}

template <class T>
static void scale_blocks(const Scale& p, int64_t j0, int64_t j1) {
  constexpr int P = Simd<T>::kPanel;
  for (int64_t bj = j0; bj < j1; bj++) {
    T col[P];
    for (int j = 0; j < P; j++)
      col[j] = p.col && bj * P + j < p.x.cols ? T(p.col[bj * P + j]) : T(1);
    const T* x = panel_block<T>(p.x, 0, bj);
    T* out = panel_block<T>(p.out, 0, bj);
    for (int64_t i = 0; i < p.x.rows; i++, x += P, out += P) {
      const T row = p.row ? T(p.row[i]) : T(1);
      if (!p.strict_upper || bj * P > i) {
        for (int j = 0; j < P; j++) out[j] = row * x[j] * col[j];
      } else {
        for (int j = 0; j < P; j++) out[j] = bj * P + j > i ? row * x[j] * col[j] : T(0);
      }
      if (p.diagonal && i / P == bj) out[i % P] += T(p.diagonal[i]);
    }
  }
}

// Numbers that fill a vector once they are fp64.
template <class T>
SK_INLINE Vector<double> load_wide(const T* p) {
  typedef T Narrow
      __attribute__((vector_size(Simd<double>::kLanes * sizeof(T)), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vector<double>);
}

template <class T>
static void column_sums_of(ColumnSum what, const Panels& a, const Panels& b, int64_t j0, int64_t j1,
                           double* sums) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<double>::kLanes, kVectors = P / kLanes;
  for (int64_t bj = j0; bj < j1; bj++) {
    Vector<double> sum[kVectors] = {};
    const T* x = panel_block<T>(a, 0, bj);
    if (what == ColumnSum::kAbs) {
      for (int64_t i = 0; i < a.rows; i++, x += P)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) {
          const Vector<double> of_x = load_wide(x + v * kLanes);
          sum[v] += of_x < 0 ? -of_x : of_x;
        }
    } else {
      const T* y = panel_block<T>(b, 0, bj);
      for (int64_t i = 0; i < a.rows; i++, x += P, y += P)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++)
          sum[v] += load_wide(x + v * kLanes) * load_wide(y + v * kLanes);
    }
    for (int64_t j = bj * P; j < a.cols && j < (bj + 1) * P; j++) {
      const int at = int(j - bj * P);
      sums[j] = sum[at / kLanes][at % kLanes];
    }
  }
}

template <class U, U kMask>
SK_INLINE U max_masked(const U* p, int64_t n) {
  U most = 0;
  for (int64_t j = 0; j < n; j++) {
    const U magnitude = p[j] & kMask;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

template <class U, U kMask>
static U max_abs_of(const Matrix& given, int64_t r0, int64_t r1) {
  Matrix m = given;
  m.data = static_cast<U*>(m.data) + r0 * m.row_stride;
  m.rows = r1 - r0;
  if (m.row_stride == 1 && m.col_stride != 1) m = m.transposed();
  const U* base = static_cast<const U*>(m.data);
  U most = 0;
  if (m.col_stride == 1 && m.row_stride == m.cols)
    return max_masked<U, kMask>(base, m.rows * m.cols);
  for (int64_t i = 0; i < m.rows; i++) {
    const U* row = base + i * m.row_stride;
    U of_row = 0;
    if (m.col_stride == 1) {
      of_row = max_masked<U, kMask>(row, m.cols);
    } else {
      for (int64_t j = 0; j < m.cols; j++) {
        const U magnitude = row[j * m.col_stride] & kMask;
        of_row = magnitude > of_row ? magnitude : of_row;
      }
    }
    most = of_row > most ? of_row : most;
  }
  return most;
}

[[maybe_unused]] static uint64_t max_abs_bits(const Matrix& m, int64_t r0, int64_t r1) {
  switch (m.dtype) {
    case DType::kF32:
      return max_abs_of<uint32_t, 0x7fffffffu>(m, r0, r1);
    case DType::kF64:
      return max_abs_of<uint64_t, 0x7fffffffffffffffull>(m, r0, r1);
    case DType::kBF16:
      return uint64_t(max_abs_of<uint16_t, 0x7fff>(m, r0, r1)) << 16;
    case DType::kF16:
      return bits_of(to_float(F16{max_abs_of<uint16_t, 0x7fff>(m, r0, r1)}));
  }
  return 0;
}

// Multiply-adds on registers alone: no kernel can be faster.
template <class T, class E>
static double multiply_adds(int64_t rounds) {
  constexpr int kSums = SK_MR * SK_NV >= 16 ? 16 : 12, kSteps = 64,
                kLanes = SK_VECTOR_BYTES / int(sizeof(T));
#if SK_HAS_BF16_DOT
  if constexpr (__is_same(E, uint32_t)) {
    constexpr int kPairSums = 16;  // the sums take longer
    __m512 sum[kPairSums] = {};
    __m512bh a = {}, b = {};
    for (int64_t i = 0; i < rounds * kSteps; i++)
#pragma GCC unroll 16
      for (int s = 0; s < kPairSums; s++) {
        asm volatile("" : "+v"(a), "+v"(b));  // neither hoisted nor dropped
        sum[s] = _mm512_dpbf16_ps(sum[s], a, b);
      }
#pragma GCC unroll 16
    for (int s = 0; s < kPairSums; s++) asm volatile("" : : "v"(sum[s]));
    return 4.0 * double(rounds) * kSteps * kPairSums * kLanes;
  }
#endif
  Vector<T> sum[kSums] = {}, a = {}, b = {};
  for (int64_t i = 0; i < rounds * kSteps; i++)
#pragma GCC unroll 16
    for (int s = 0; s < kSums; s++) {
      asm volatile("" : "+" SK_REGISTER(a), "+" SK_REGISTER(b));
      sum[s] += a * b;
    }
#pragma GCC unroll 16
  for (int s = 0; s < kSums; s++) asm volatile("" : : SK_REGISTER(sum[s]));
  return 2.0 * double(rounds) * kSteps * kSums * kLanes;
}
