// What the micro-kernels are made of, written once with compiler vector types and compiled per
// instruction set: vectors, element formats, P x P blocks, panels of packed matrices.
// The including file has set, inside a target region of its own:
//   SK_VECTOR_BYTES  bytes of a vector register
//   SK_MR, SK_NV     rows and vectors of a register tile (SK_MR * SK_NV accumulators)
//   SK_PV            vectors of a panel, a multiple of SK_NV: the panel width is P = SK_PV * lanes
//   SK_HAS_F16C, SK_HAS_BF16_DOT  0 or 1
//   SK_NAME          what `info` calls this set
// and is inside a namespace of its own. No standard header may be included from here.
//
// It may define, where the rest is not best for it:
//   SK_BLOCK_K       rows of a panel that are multiplied before the accumulators go to memory
//   SK_UNROLL_K      of them that one turn of the innermost loop multiplies
//   SK_READ_ALONG    rows of a register tile whose element the multiplication itself reads; only
//                    AVX-512 can
//   SK_IN_ORDER      1: multiplications stay in the order of the source and two rows of a panel are
//                    addressed from their middle (AVX2, with SK_UNROLL_K 2)
//   SK_FETCH_AHEAD   1: while a block is multiplied, the next panel is fetched from L3
#ifndef SK_BLOCK_K
#define SK_BLOCK_K 192
#define SK_UNROLL_K 1
#define SK_READ_ALONG 0
#endif
#ifndef SK_IN_ORDER
#define SK_IN_ORDER 0
#define SK_FETCH_AHEAD 0
#endif

#define SK_INLINE static inline __attribute__((always_inline))

#if defined(__clang__) || __GNUC__ >= 12
#define SK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, (__VA_ARGS__)...)
#else
#define SK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){(__VA_ARGS__)...})
#endif

// The constraint of an operand in a vector register.
#if defined(__aarch64__)
#define SK_REGISTER "w"
#elif SK_VECTOR_BYTES == 64
#define SK_REGISTER "v"
#else
#define SK_REGISTER "x"
#endif

template <class T>
struct Simd {
  static constexpr int kLanes = SK_VECTOR_BYTES / sizeof(T);
  static constexpr int kPanel = SK_PV * kLanes;  // P
  typedef T Vector __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(SK_VECTOR_BYTES), aligned(4), may_alias));
};

template <class T>
using Vector = typename Simd<T>::Vector;
typedef uint32_t Words __attribute__((vector_size(SK_VECTOR_BYTES)));
typedef uint32_t UnalignedWords
    __attribute__((vector_size(SK_VECTOR_BYTES), aligned(4), may_alias));

template <class T>
SK_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
SK_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// ---------------------------------------------------------------- element formats

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

SK_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
SK_INLINE float float_of(uint32_t u) { return __builtin_bit_cast(float, u); }

// Round to nearest even, in the upper 16 bits. A NaN keeps its sign and stays a NaN.
SK_INLINE uint32_t round_bf16(uint32_t u) {
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return (u & 0x7fffffffu) > 0x7f800000u ? (u | 0x00400000u) : rounded;
}

SK_INLINE float to_float(BF16 x) { return float_of(uint32_t(x.bits) << 16); }
SK_INLINE BF16 to_bf16(float x) { return {uint16_t(round_bf16(bits_of(x)) >> 16)}; }

#if !SK_HAS_F16C
SK_INLINE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu);
  // Shifting exponent and mantissa into place and multiplying by 2^112 is exact for every finite
  // half, subnormals included.
  const float finite = float_of(magnitude << 13) * 0x1p112f;
  const uint32_t u = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : bits_of(finite);
  return float_of(sign | u);
}
SK_INLINE F16 to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or above
  // Adding 2^(e+13) times 0.5 to a subnormal result lets the FPU round it to the half's grid.
  if (magnitude < 0x38800000u)
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}
#else
SK_INLINE float to_float(F16 x) { return _cvtsh_ss(x.bits); }
SK_INLINE F16 to_f16(float x) { return {uint16_t(_cvtss_sh(x, 0))}; }
#endif

template <class T>
SK_INLINE void get(const float* p, T* out) {
  *out = T(*p);
}
template <class T>
SK_INLINE void get(const double* p, T* out) {
  *out = T(*p);
}
template <class T>
SK_INLINE void get(const BF16* p, T* out) {
  *out = T(to_float(*p));
}
template <class T>
SK_INLINE void get(const F16* p, T* out) {
  *out = T(to_float(*p));
}
template <class T>
SK_INLINE void put(float* p, T x) {
  *p = float(x);
}
template <class T>
SK_INLINE void put(double* p, T x) {
  *p = double(x);
}
template <class T>
SK_INLINE void put(BF16* p, T x) {
  *p = to_bf16(float(x));
}
template <class T>
SK_INLINE void put(F16* p, T x) {
  *p = to_f16(float(x));
}

// n consecutive elements; with a constant n the loops below become a few vector instructions.
template <class S, class T>
SK_INLINE void get_row(const S* p, int n, T* out) {
  for (int j = 0; j < n; j++) get(p + j, out + j);
}
template <class S, class T>
SK_INLINE void put_row(S* p, int n, const T* in) {
  for (int j = 0; j < n; j++) put(p + j, in[j]);
}
// Without a conversion, whole vectors, of which the last two may overlap: a call of memcpy takes
// longer than a short row.
template <class T>
SK_INLINE void copy_row(const T* p, int n, T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (n < kLanes) {
    for (int j = 0; j < n; j++) out[j] = p[j];
    return;
  }
  for (int j = 0; j + kLanes <= n; j += kLanes) store(out + j, load(p + j));
  if (n % kLanes != 0) store(out + n - kLanes, load(p + n - kLanes));
}
SK_INLINE void get_row(const float* p, int n, float* out) { copy_row(p, n, out); }
SK_INLINE void get_row(const double* p, int n, double* out) { copy_row(p, n, out); }
SK_INLINE void put_row(float* p, int n, const float* in) { copy_row(in, n, p); }
SK_INLINE void put_row(double* p, int n, const double* in) { copy_row(in, n, p); }
#if SK_HAS_F16C
SK_INLINE void get_row(const F16* p, int n, float* out) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + j))));
  for (; j < n; j++) out[j] = to_float(p[j]);
}
SK_INLINE void put_row(F16* p, int n, const float* in) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128((__m128i*)(p + j), _mm256_cvtps_ph(_mm256_loadu_ps(in + j), 0));
  for (; j < n; j++) p[j] = to_f16(in[j]);
}
#endif

// ---------------------------------------------------------------- P x P blocks

// A block is P x P numbers in L1, row-major with row length P; whatever lies beyond the matrix is
// 0.
template <class T>
using Block = T[Simd<T>::kPanel * Simd<T>::kPanel];

// Transposes kLanes x kLanes numbers held in kLanes vectors, in log2(kLanes) stages.
template <class T>
struct Transpose {
  static constexpr int kLanes = Simd<T>::kLanes;
  using Lanes = std::make_integer_sequence<int, kLanes>;

  // Swaps the off-diagonal d x d sub-blocks of rows a and b, where b is row a + d.
  template <int d, int... lane>
  SK_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, lane...>) {
    const Vector<T> upper = SK_SHUFFLE(a, b, (lane & d) == 0 ? lane : kLanes + lane - d);
    b = SK_SHUFFLE(a, b, (lane & d) == 0 ? lane + d : kLanes + lane);
    a = upper;
  }
  template <int d>
  SK_INLINE void stage(Vector<T>* row) {
    if constexpr (d > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        if ((i & d) == 0) exchange<d>(row[i], row[i + d], Lanes{});
      stage<d / 2>(row);
    }
  }
};

// The transpose of the first rows and columns of a block, whole vectors of both; beyond them the
// rows of the result are 0.
template <class T>
SK_INLINE void transpose_rows(int rows, int cols, const T* in, T* out) {
  constexpr int kLanes = Simd<T>::kLanes, P = Simd<T>::kPanel;
  for (int i = 0; i < rows; i += kLanes)
    for (int j = 0; j < cols; j += kLanes) {
      Vector<T> row[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) row[r] = load(in + (i + r) * P + j);
      Transpose<T>::template stage<kLanes / 2>(row);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) store(out + (j + r) * P + i, row[r]);
    }
  for (int i = rows; i < P; i += kLanes)
    for (int j = 0; j < cols; j++) store(out + j * P + i, Vector<T>{});
}

template <class T>
SK_INLINE void transpose_block(const T* in, T* out) {
  transpose_rows(Simd<T>::kPanel, Simd<T>::kPanel, in, out);
}

template <class T>
SK_INLINE void clear_block(T* block) {
  constexpr int P = Simd<T>::kPanel;
  for (int i = 0; i < P * P; i += Simd<T>::kLanes) store(block + i, Vector<T>{});
}

template <int bytes>
SK_INLINE void prefetch(const void* p) {
  for (int line = 0; line < bytes; line += 64)
    __builtin_prefetch(static_cast<const char*>(p) + line);
}

template <class S, class T>
static void load_block_of(const Matrix& m, int64_t i0, int64_t j0, int rows, int cols, T* block) {
  constexpr int P = Simd<T>::kPanel;
  const S* base = static_cast<const S*>(m.data) + i0 * m.row_stride + j0 * m.col_stride;
  if (m.col_stride == 1) {
    if (rows < P || cols < P) clear_block(block);
    if (cols == P)
      for (int i = 0; i < rows; i++) {
        const S* row = base + i * m.row_stride;
        prefetch<P * sizeof(S)>(row + P);  // the next block's: no stride is short enough to guess
        get_row(row, P, block + i * P);
      }
    else
      for (int i = 0; i < rows; i++) get_row(base + i * m.row_stride, cols, block + i * P);
  } else if (m.row_stride == 1) {
    alignas(64) Block<T> columns;
    load_block_of<S, T>(m.transposed(), j0, i0, cols, rows, columns);
    transpose_block(columns, block);
  } else {
    if (rows < P || cols < P) clear_block(block);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < cols; j++)
        get(base + i * m.row_stride + j * m.col_stride, block + i * P + j);
  }
}

template <class T>
static void load_block(const Matrix& m, int64_t i0, int64_t j0, int rows, int cols, T* block) {
  switch (m.dtype) {
    case DType::kF32:
      return load_block_of<float, T>(m, i0, j0, rows, cols, block);
    case DType::kF64:
      return load_block_of<double, T>(m, i0, j0, rows, cols, block);
    case DType::kBF16:
      return load_block_of<BF16, T>(m, i0, j0, rows, cols, block);
    case DType::kF16:
      return load_block_of<F16, T>(m, i0, j0, rows, cols, block);
  }
}

template <class S, class T>
static void store_block_of(const Matrix& m, int64_t i0, int64_t j0, int rows, int cols,
                           const T* block) {
  constexpr int P = Simd<T>::kPanel;
  S* base = static_cast<S*>(m.data) + i0 * m.row_stride + j0 * m.col_stride;
  if (m.col_stride == 1) {
    if (cols == P)
      for (int i = 0; i < rows; i++) put_row(base + i * m.row_stride, P, block + i * P);
    else
      for (int i = 0; i < rows; i++) put_row(base + i * m.row_stride, cols, block + i * P);
  } else if (m.row_stride == 1) {
    alignas(64) Block<T> columns;
    transpose_block(block, columns);
    store_block_of<S, T>(m.transposed(), j0, i0, cols, rows, columns);
  } else {
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < cols; j++)
        put(base + i * m.row_stride + j * m.col_stride, block[i * P + j]);
  }
}

template <class T>
static void store_block(const Matrix& m, int64_t i0, int64_t j0, int rows, int cols,
                        const T* block) {
  switch (m.dtype) {
    case DType::kF32:
      return store_block_of<float, T>(m, i0, j0, rows, cols, block);
    case DType::kF64:
      return store_block_of<double, T>(m, i0, j0, rows, cols, block);
    case DType::kBF16:
      return store_block_of<BF16, T>(m, i0, j0, rows, cols, block);
    case DType::kF16:
      return store_block_of<F16, T>(m, i0, j0, rows, cols, block);
  }
}

// ---------------------------------------------------------------- panels

template <class T>
SK_INLINE T* panel_block(const Panels& p, int64_t bi, int64_t bj) {
  constexpr int P = Simd<T>::kPanel;
  return static_cast<T*>(p.data) + bj * p.stride + bi * P * P;
}
SK_INLINE uint32_t* pair_block(const Panels& p, int64_t bi, int64_t bj) {
  constexpr int P = Simd<float>::kPanel;
  return static_cast<uint32_t*>(p.data) + bj * p.stride + bi * (P / 2) * P;
}

#if SK_HAS_BF16_DOT
SK_INLINE void store_pairs(uint32_t* out, Vector<float> low, Vector<float> high) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, halves));
}
#else
SK_INLINE void store_pairs(uint32_t* out, Vector<float> low, Vector<float> high) {
  for (int l = 0; l < Simd<float>::kLanes; l++)
    out[l] = (round_bf16(bits_of(low[l])) >> 16) | (round_bf16(bits_of(high[l])) & 0xffff0000u);
}
#endif

#if SK_HAS_BF16_DOT || defined(SK_EMULATE_TILES)
#define SK_HAS_IMAGES 1
#include "images.inl"
#else
#define SK_HAS_IMAGES 0
#endif

// Rows [0, rows) of a block to block (bi, bj) of a packed matrix, and to its image, to which the
// block's transpose spares a transposition.
template <class T>
SK_INLINE void store_panel(const Panels& p, int64_t bi, int64_t bj, int rows, const T* block,
                           [[maybe_unused]] const T* transposed = nullptr) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
#if SK_HAS_IMAGES
  if constexpr (sizeof(T) == 4)
    if (p.left) store_image(p, bi, bj, rows, block, transposed);
  if (!p.data) return;
#endif
  if constexpr (sizeof(T) == 4) {
    if (p.kind == Kind::kBF16) {
      uint32_t* out = pair_block(p, bi, bj);
      for (int i = 0; i < rows; i += 2, out += P)
        for (int j = 0; j < P; j += kLanes)
          store_pairs(out + j, load(block + i * P + j), load(block + (i + 1) * P + j));
      return;
    }
  }
  T* out = panel_block<T>(p, bi, bj);
  for (int i = 0; i < rows * P; i += kLanes) store(out + i, load(block + i));
}

template <class T>
SK_INLINE void load_panel(const Panels& p, int64_t bi, int64_t bj, int rows, T* block) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  if (rows < P) clear_block(block);
  if constexpr (sizeof(T) == 4) {
    if (p.kind == Kind::kBF16) {
      const uint32_t* in = pair_block(p, bi, bj);
      for (int i = 0; i < rows; i += 2, in += P)
        for (int j = 0; j < P; j += kLanes) {
          const Words pair = *reinterpret_cast<const UnalignedWords*>(in + j);
          store(block + i * P + j, (Vector<float>)(pair << 16));
          store(block + (i + 1) * P + j, (Vector<float>)(pair & 0xffff0000u));
        }
      return;
    }
  }
  const T* in = panel_block<T>(p, bi, bj);
  for (int i = 0; i < rows * P; i += kLanes) store(block + i, load(in + i));
}
