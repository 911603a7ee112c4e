// Householder reflections of one panel. blocks.inl says how this is compiled.

// Rows whose products are added up in T before the sum goes to fp64: a reflection is orthogonal to
// within the rounding of its vector's length.
constexpr int64_t kSummedRows = 64;

// x_i += x_ik change for the rows i of a panel, where kChange, and then dots = sum of x_i,next x_i.
template <class T, bool kChange>
static void change_rows(T* __restrict x, int64_t rows, int k, const T* change, int next,
                        double* __restrict dots) {
  constexpr int P = Simd<T>::kPanel, kLanes = Simd<T>::kLanes;
  Vector<T> by[SK_PV];
#pragma GCC unroll 4
  for (int v = 0; v < SK_PV; v++) by[v] = load(change + v * kLanes);
  for (int j = 0; j < P; j++) dots[j] = 0;
  for (int64_t begin = 0; begin < rows; begin += kSummedRows) {
    const int64_t end = begin + kSummedRows < rows ? begin + kSummedRows : rows;
    Vector<T> sum[SK_PV] = {};
    for (T* row = x + begin * P; row < x + end * P; row += P) {
      Vector<T> values[SK_PV];
#pragma GCC unroll 4
      for (int v = 0; v < SK_PV; v++) values[v] = load(row + v * kLanes);
      if constexpr (kChange) {
        const T factor = row[k];
#pragma GCC unroll 4
        for (int v = 0; v < SK_PV; v++) {
          values[v] += factor * by[v];
          store(row + v * kLanes, values[v]);
        }
      }
      const T of_next = row[next];
#pragma GCC unroll 4
      for (int v = 0; v < SK_PV; v++) sum[v] += of_next * values[v];
    }
    T sums[P];
#pragma GCC unroll 4
    for (int v = 0; v < SK_PV; v++) store(sums + v * kLanes, sum[v]);
    for (int j = 0; j < P; j++) dots[j] += double(sums[j]);
  }
}

template <class T>
static void reflect_panel(const Reflections& p) {
  constexpr int P = Simd<T>::kPanel;
  T* const x = static_cast<T*>(p.x.data);
  const int64_t m = p.x.rows;
  const int n = int(p.x.cols);
  // The least normal number over the unit roundoff.
  constexpr double kSmallest = sizeof(T) == 4 ? 0x1p-102 : 0x1p-969;
  // Column k keeps the elements of x below the diagonal until the end: v = factor x, v_k = 1.
  double dots[P], factor[P] = {}, product[P];
  alignas(64) T change[P] = {};
  change_rows<T, false>(x, m, 0, change, 0, dots);
  for (int k = 0; k < n; k++) {
    T* const row = x + k * P;
    const double alpha = double(row[k]), length = __builtin_sqrt(dots[k]);
    // A column of zeros is reflected by I, and so is one whose squares lose digits to underflow:
    // with such a length H would not be orthogonal, and beside the other columns it is rounding
    // noise.
    const bool zero = !(dots[k] > kSmallest);
    const double r = zero ? 0 : alpha < 0 ? length : -length;
    const double tau = zero ? 0 : (r - alpha) / r;
    factor[k] = zero ? 0 : 1 / (alpha - r);
    p.signs[k] = r < 0 ? -1 : 1;
    // H_1 ... H_k = I - V T Vᵀ: column k of T is -tau T Vᵀ v above tau.
    for (int i = 0; i < k; i++)
      product[i] = factor[i] * ((dots[i] - alpha * double(row[i])) * factor[k] + double(row[i]));
    for (int i = 0; i < k; i++) {
      double sum = 0;
      for (int l = i; l < k; l++) sum += p.t[i * P + l] * product[l];
      p.t[i * P + k] = -tau * sum;
    }
    p.t[k * P + k] = tau;
    for (int i = k + 1; i < P; i++) p.t[i * P + k] = 0;
    // Row k of R is not needed. Below it x_ij -= tau v_i (vᵀx_j), v_i = factor x_ik.
    for (int j = 0; j <= k; j++) change[j] = 0;
    for (int j = k + 1; j < P; j++) {
      change[j] = T(-tau * factor[k] * factor[k] * (dots[j] - r * double(row[j])));
      row[j] = 0;
    }
    row[k] = 1;
    if (k + 1 < n) change_rows<T, true>(row + P, m - k - 1, k, change, k + 1, dots);
  }
  for (int64_t i = 0; i < m; i++)
    for (int j = 0; j < P && j < i; j++) x[i * P + j] = T(double(x[i * P + j]) * factor[j]);
}
