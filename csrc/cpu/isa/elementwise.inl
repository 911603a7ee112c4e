// The elementwise parts of the fused steps, block by block. blocks.inl says how this is compiled.

#include "tiles.inl"

#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
SK_INLINE Vector<float> square_root(Vector<float> x) {
  return (Vector<float>)_mm512_sqrt_ps((__m512)x);
}
SK_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
}
#elif defined(__x86_64__) && SK_VECTOR_BYTES == 32
SK_INLINE Vector<float> square_root(Vector<float> x) {
  return (Vector<float>)_mm256_sqrt_ps((__m256)x);
}
SK_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
}
#elif defined(__x86_64__)
SK_INLINE Vector<float> square_root(Vector<float> x) {
  return (Vector<float>)_mm_sqrt_ps((__m128)x);
}
SK_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm_sqrt_pd((__m128d)x);
}
#else
template <class V>
SK_INLINE V square_root(V x) {
  for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); l++)
    x[l] = sizeof(x[0]) == 4 ? __builtin_sqrtf(float(x[l])) : __builtin_sqrt(double(x[l]));
  return x;
}
#endif

// The fp64 sum of a block, in a fixed order.
template <class T>
SK_INLINE double block_sum(const T* x) {
  constexpr int P = Simd<T>::kPanel, kSums = 4;
  double sums[kSums] = {};
  for (int i = 0; i < P * P; i += kSums)
    for (int l = 0; l < kSums; l++) sums[l] += double(x[i + l]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Calls f(bi, bj, rows, cols) for the blocks of block rows [i0, i1) of an m x n matrix.
template <class T, class F>
SK_INLINE void for_blocks(int64_t m, int64_t n, int64_t i0, int64_t i1, const F& f) {
  constexpr int P = Simd<T>::kPanel;
  for (int64_t bi = i0; bi < i1; bi++)
    for (int64_t bj = 0; bj * P < n; bj++)
      f(bi, bj, int(m - bi * P < P ? m - bi * P : P), int(n - bj * P < P ? n - bj * P : P));
}

template <class T>
SK_INLINE void store_both(const Panels& out, const Panels& out_t, int64_t bi, int64_t bj, int rows,
                          int cols, const T* block) {
  if (!out_t) {
    if (out) store_panel(out, bi, bj, rows, block);
    return;
  }
  alignas(64) Block<T> transposed;
  transpose_block(block, transposed);
  if (out) store_panel(out, bi, bj, rows, block, transposed);
  store_panel(out_t, bj, bi, cols, transposed, block);
}

template <class T>
static void square_average(const SquareAverage& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  alignas(64) Block<T> g, v;
  for (int64_t i = i0; i < i1; i++) p.sums[i] = 0;
  for_blocks<T>(p.g.rows, p.g.cols, i0, i1,
                [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
                  load_block(p.g, bi * P, bj * P, rows, cols, g);
                  load_block(p.v, bi * P, bj * P, rows, cols, v);
                  for (int i = 0; i < P * P; i += kLanes) {
                    const Vector<T> x = load(g + i);
                    store(v + i, T(p.beta) * load(v + i) + T(p.weight) * (x * x));
                  }
                  p.sums[bi] += block_sum(v);
                  store_block(p.v, bi * P, bj * P, rows, cols, v);
                });
}

template <class T>
static void adapted_length(const AdaptedLength& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  alignas(64) Block<T> m, v;
  for (int64_t i = i0; i < i1; i++) p.sums[i] = 0;
  for_blocks<T>(p.m.rows, p.m.cols, i0, i1,
                [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
                  load_block(p.m, bi * P, bj * P, rows, cols, m);
                  load_block(p.v, bi * P, bj * P, rows, cols, v);
                  for (int i = 0; i < P * P; i += kLanes) {
                    const Vector<T> below = square_root(T(p.v_scale) * load(v + i)) + T(p.eps);
                    const Vector<T> d = T(p.m_scale) * load(m + i) / below;
                    store(m + i, below == 0 ? Vector<T>{} : d * d);
                  }
                  p.sums[bi] += block_sum(m);
                });
}

template <class T>
static void adam_moments(const AdamMoments& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  alignas(64) Block<T> g, m, v;
  for_blocks<T>(p.m.rows, p.m.cols, i0, i1,
                [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
                  load_panel(p.g, bi, bj, rows, g);
                  load_block(p.m, bi * P, bj * P, rows, cols, m);
                  load_block(p.v, bi * P, bj * P, rows, cols, v);
                  const T beta1 = T(p.beta1), add1 = T(1 - p.beta1), beta2 = T(p.beta2),
                          add2 = T(1 - p.beta2);
                  for (int i = 0; i < P * P; i += kLanes) {
                    const Vector<T> x = load(g + i);
                    const Vector<T> moment = beta1 * load(m + i) + add1 * x,
                                    square = beta2 * load(v + i) + add2 * (x * x);
                    const Vector<T> below = square_root(square) + T(p.eps);
                    store(m + i, moment);
                    store(v + i, square);
                    store(g + i, below == 0 ? Vector<T>{} : moment / below);
                  }
                  store_block(p.m, bi * P, bj * P, rows, cols, m);
                  store_block(p.v, bi * P, bj * P, rows, cols, v);
                  store_both(p.out, p.out_t, bi, bj, rows, cols, g);
                });
}

template <class T>
SK_INLINE Vector<T> sign_of(Vector<T> x) {
  const Vector<T> one = Vector<T>{} + T(1), zero = Vector<T>{};
  return x > 0 ? one : (x < 0 ? -one : (x == 0 ? zero : x));  // NaN stays
}

// Sums of squares of a block: rows added to row_sums, columns to col_sums.
template <class T>
SK_INLINE void add_squares(const T* x, int rows, int cols, double* row_sums, double* col_sums) {
  constexpr int P = Simd<T>::kPanel;
  double column[P] = {};
  for (int i = 0; i < rows; i++) {
    double sum = 0;
    for (int j = 0; j < P; j++) {
      const double square = double(x[i * P + j]) * double(x[i * P + j]);
      column[j] += square;
      sum += square;
    }
    row_sums[i] += sum;
  }
  for (int j = 0; j < cols; j++) col_sums[j] += column[j];
}

template <class T>
static void momentum(const Momentum& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  const int64_t rows_in_all = p.m.rows, n = p.m.cols;
  alignas(64) Block<T> g, m, v;
  for (int64_t i = i0; i < i1; i++) {
    for (double* rows : {p.m_rows, p.g_rows})
      for (int64_t r = i * P; rows && r < (i + 1) * P && r < rows_in_all; r++) rows[r] = 0;
    for (double* cols : {p.m_cols, p.g_cols})
      for (int64_t j = 0; cols && j < n; j++) cols[i * n + j] = 0;
    if (p.v_sums) p.v_sums[i] = 0;
  }
  for_blocks<T>(rows_in_all, n, i0, i1,
                [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
                  load_panel(p.g, bi, bj, rows, g);
                  load_block(p.m, bi * P, bj * P, rows, cols, m);
                  if (p.g_rows)
                    add_squares(g, rows, cols, p.g_rows + bi * P, p.g_cols + bi * n + bj * P);
                  const T beta = T(p.beta1), add = T(1 - p.beta1);
                  for (int i = 0; i < P * P; i += kLanes) {
                    const Vector<T> x = load(g + i), moment = beta * load(m + i) + add * x;
                    const Vector<T> mix = p.nesterov ? beta * moment + add * x : moment;
                    store(m + i, moment);
                    store(g + i, p.sign ? sign_of<T>(mix) : mix);
                  }
                  if (p.m_rows)
                    add_squares(m, rows, cols, p.m_rows + bi * P, p.m_cols + bi * n + bj * P);
                  store_block(p.m, bi * P, bj * P, rows, cols, m);
                  store_panel(p.out, bi, bj, rows, g);
                  if (p.v_sums) {
                    load_block(p.v, bi * P, bj * P, rows, cols, v);
                    p.v_sums[bi] += block_sum(v);
                  }
                });
}

template <class T>
SK_INLINE Vector<T> ratio(Vector<T> energy, Vector<T> v, T eps, EpsPlace place) {
  const Vector<T> top = square_root(energy);
  const Vector<T> below = place == EpsPlace::kOutside ? square_root(v) + eps : square_root(v + eps);
  const Vector<T> one = Vector<T>{} + T(1), zero = Vector<T>{};
  // 0 / 0 is 1; x / 0 stays infinite.
  return below == zero ? (top == zero ? one : top / below) : top / below;
}

template <class T>
static void variance_adaptation(const VarianceAdaptation& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  const int64_t m = p.o.rows, n = p.o.cols;
  alignas(64) Block<T> o, v;
  for_blocks<T>(
      m, n, i0, i1, [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
        load_panel(p.o, bi, bj, rows, o);
        if (p.v) load_block(p.v, bi * P, bj * P, rows, cols, v);
        alignas(64) T seen[P] = {}, top[P] = {};
        for (int j = 0; j < cols; j++) {
          seen[j] = p.seen_col ? T(p.seen_col[bj * P + j]) : T(0);
          top[j] = T(p.col[bj * P + j]);
        }
        const T beta = T(p.beta2), add = T(1 - p.beta2), scale = T(p.scale);
        for (int i = 0; i < rows; i++) {
          const T top_row = T(p.row[bi * P + i]),
                  seen_row = p.seen_row ? T(p.seen_row[bi * P + i]) : T(0);
          for (int j = 0; j < P; j += kLanes) {
            const Vector<T> energy = top_row * load(top + j), x = load(o + i * P + j);
            if (!p.v) {
              store(o + i * P + j, scale * energy * x);
              continue;
            }
            const Vector<T> next = beta * load(v + i * P + j) + add * (seen_row * load(seen + j));
            store(v + i * P + j, next);
            store(o + i * P + j,
                  scale * ratio<T>(energy, T(p.v_scale) * next, T(p.eps), p.place) * x);
          }
        }
        if (p.v) store_block(p.v, bi * P, bj * P, rows, cols, v);
        store_both(p.out, p.out_t, bi, bj, rows, cols, o);
      });
}

template <class T>
static void sign_adaptation(const SignAdaptation& p, int64_t i0, int64_t i1) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  alignas(64) Block<T> g, m, v;
  for (int64_t i = i0; p.pass == 0 && i < i1; i++) p.sums[i] = 0;
  for_blocks<T>(p.m.rows, p.m.cols, i0, i1,
                [&](int64_t bi, int64_t bj, int rows, int cols) __attribute__((always_inline)) {
                  load_panel(p.g, bi, bj, rows, g);
                  load_block(p.m, bi * P, bj * P, rows, cols, m);
                  if (p.v) load_block(p.v, bi * P, bj * P, rows, cols, v);
                  const T beta1 = T(p.beta1), add1 = T(1 - p.beta1), beta2 = T(p.beta2),
                          add2 = T(1 - p.beta2);
                  for (int i = 0; i < P * P; i += kLanes) {
                    const Vector<T> x = load(g + i), moment = beta1 * load(m + i) + add1 * x;
                    const Vector<T> mhat = T(p.m_scale) * moment;
                    if (p.pass == 0) {
                      const Vector<T> seen = p.seen_m ? mhat : x;
                      store(v + i, beta2 * load(v + i) + add2 * (seen * seen));
                      continue;
                    }
                    const Vector<T> mix = p.nesterov ? beta1 * moment + add1 * x : moment,
                                    top = p.top_m ? mhat : x;
                    Vector<T> gamma = Vector<T>{} + T(p.scale);
                    if (p.v)
                      gamma *= ratio<T>(top * top, T(p.v_scale) * load(v + i), T(p.eps), p.place);
                    store(m + i, moment);
                    store(g + i, gamma * sign_of<T>(mix));
                  }
                  if (p.pass == 0) {
                    p.sums[bi] += block_sum(v);
                    return store_block(p.v, bi * P, bj * P, rows, cols, v);
                  }
                  store_block(p.m, bi * P, bj * P, rows, cols, m);
                  store_both(p.out, p.out_t, bi, bj, rows, cols, g);
                });
}
