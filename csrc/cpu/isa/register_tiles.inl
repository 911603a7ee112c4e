// Register tiles: the multiply-adds of a few rows and a few vectors of columns, summed in
// registers. See blocks.inl for how this is compiled.

// sum += a b. With kFromMemory the multiplication itself reads `a`: an instruction less and a load
// more for every vector, where else all of a row share one broadcast.
template <bool kFromMemory, class T>
SK_INLINE void multiply_add(Vector<T>& sum, const T& a, Vector<T> b) {
#if SK_READ_ALONG
  if constexpr (kFromMemory && sizeof(T) == 4) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(a));
    return;
  } else if constexpr (kFromMemory) {
    asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(b), "m"(a));
    return;
  }
#endif
#if SK_IN_ORDER
  // A tile leaves one of 16 registers free. In an order of its own, or with a sum in the place of a
  // factor, the compiler would move sums about.
  if constexpr (sizeof(T) == 4)
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(b), "x"(_mm256_broadcast_ss(&a)));
  else
    asm volatile("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(b), "x"(_mm256_broadcast_sd(&a)));
#else
  sum += a * b;
#endif
}

// Rows of a tile of one vector, whose few sums would else wait for each other.
constexpr int kTallRows = SK_MR * SK_NV < 16 ? 2 * SK_MR : SK_MR;

// sum[i][v] += a[i] b[v] for the elements of one k.
template <class T, int MR, int NV>
SK_INLINE void add_products(Vector<T> (&sum)[MR][NV], const T* a, const T* b) {
  Vector<T> row[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) row[v] = load(b + v * Simd<T>::kLanes);
#pragma GCC unroll 32
  for (int i = 0; i < MR - SK_READ_ALONG; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) multiply_add<false, T>(sum[i][v], a[i], row[v]);
#pragma GCC unroll 32
  for (int i = MR - SK_READ_ALONG; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) multiply_add<true, T>(sum[i][v], a[i], row[v]);
}

// c (MR rows, NV vectors, row length P) = or += sum over k of a[k][0..MR) b[k][0..NV).
// Every loop over the accumulators must unroll completely: an indexed access would put the array in
// memory and cost two thirds of the speed without a word.
template <class T, int MR, int NV, bool kAdd>
SK_INLINE void register_tile(int64_t k, const T* __restrict a, const T* __restrict b,
                             T* __restrict c) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  Vector<T> sum[MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[i][v] = Vector<T>{};
#if SK_IN_ORDER
  // Two rows a turn, counted from the second, so that every offset fits into a byte: with longer
  // instructions fewer of them come a cycle.
  static_assert(SK_UNROLL_K == 2);
  a += P, b += P;
  for (int64_t turn = k / 2; turn > 0; turn--) {
    add_products<T, MR, NV>(sum, a - P, b - P);
    add_products<T, MR, NV>(sum, a, b);
    a += 2 * P, b += 2 * P;
    asm volatile("" : "+r"(a), "+r"(b));  // or the compiler would count from the first
  }
  a -= P, b -= P, k %= 2;
#else
  for (; k >= SK_UNROLL_K; k -= SK_UNROLL_K, a += SK_UNROLL_K * P, b += SK_UNROLL_K * P)
#pragma GCC unroll 4
    for (int step = 0; step < SK_UNROLL_K; step++)
      add_products<T, MR, NV>(sum, a + step * P, b + step * P);
#endif
  if constexpr (SK_UNROLL_K > 1)
    for (; k > 0; k--, a += P, b += P) add_products<T, MR, NV>(sum, a, b);
#pragma GCC unroll 32
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      T* to = c + i * P + v * kLanes;
      store(to, kAdd ? load(to) + sum[i][v] : sum[i][v]);
    }
}

#if SK_HAS_BF16_DOT
template <class T, int MR, int NV, bool kAdd>
SK_INLINE void register_tile(int64_t k, const uint32_t* __restrict a, const uint32_t* __restrict b,
                             float* __restrict c) {
  constexpr int P = Simd<float>::kPanel, kLanes = 16;
  __m512 sum[MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[i][v] = _mm512_setzero_ps();
  for (; k > 0; k--, a += P, b += P) {
    __m512bh row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < MR; i++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], pair, row[v]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      float* to = c + i * P + v * kLanes;
      _mm512_storeu_ps(to, kAdd ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][v]) : sum[i][v]);
    }
}
#endif

// Columns [v0, v0 + vectors) of SK_MR rows, or of kTallRows where it is one vector and `tall`;
// `vectors` <= SK_NV.
template <class T, class E, bool kAdd>
SK_INLINE void register_tiles(bool tall, int vectors, int64_t k, const E* a, const E* b, T* c) {
  if constexpr (SK_NV >= 3)
    if (vectors == 3) return register_tile<T, SK_MR, 3, kAdd>(k, a, b, c);
  if constexpr (SK_NV >= 2)
    if (vectors == 2) return register_tile<T, SK_MR, 2, kAdd>(k, a, b, c);
  if (kTallRows > SK_MR && tall) return register_tile<T, kTallRows, 1, kAdd>(k, a, b, c);
  register_tile<T, SK_MR, 1, kAdd>(k, a, b, c);
}

// SK_MR rows and NV vectors of columns: c = or += sum over k of a[k] b[k], where the rows of `a`
// are at the offsets and `step` leads from one k to the next. Of c there are `rows` rows.
template <class T, int NV, bool kAdd>
SK_INLINE void tile_in_place(int64_t k, const T* a, const int64_t (&offset)[SK_MR], int64_t step,
                             const T* b, int rows, T* c, int64_t c_pitch) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  Vector<T> sum[SK_MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < SK_MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[i][v] = Vector<T>{};
  for (; k > 0; k--, a += step, b += P) {
    Vector<T> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) row[v] = load(b + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < SK_MR; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[i][v] += a[offset[i]] * row[v];
  }
#pragma GCC unroll 32
  for (int i = 0; i < SK_MR; i++)
    if (i < rows)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        T* to = c + i * c_pitch + v * kLanes;
        store(to, kAdd ? load(to) + sum[i][v] : sum[i][v]);
      }
}

// The first `vectors` <= SK_NV of them.
template <class T, bool kAdd>
SK_INLINE void tiles_in_place(int vectors, int64_t k, const T* a, const int64_t (&offset)[SK_MR],
                              int64_t step, const T* b, int rows, T* c, int64_t c_pitch) {
  if constexpr (SK_NV >= 3)
    if (vectors == 3) return tile_in_place<T, 3, kAdd>(k, a, offset, step, b, rows, c, c_pitch);
  if constexpr (SK_NV >= 2)
    if (vectors == 2) return tile_in_place<T, 2, kAdd>(k, a, offset, step, b, rows, c, c_pitch);
  tile_in_place<T, 1, kAdd>(k, a, offset, step, b, rows, c, c_pitch);
}
