// What an eigendecomposition of a symmetric fp64 matrix does outside products of matrices. See
// blocks.inl for how this is compiled.

// y += A x, as far as block columns [j0, j1) of the lower triangle make A: they and the rows that
// mirror them. A is read once. x and y go up to a whole panel, with zeros in x beyond the matrix.
static void symmetric_times(const Panels& a, const double* x, int64_t j0, int64_t j1, double* y) {
  constexpr int P = Simd<double>::kPanel, kLanes = Simd<double>::kLanes;
  const int64_t n = a.rows;
  for (int64_t bj = j0; bj < j1; bj++) {
    const int64_t top = bj * P, below = top + P < n ? top + P : n;
    const double* row = panel_block<double>(a, bj, bj);
    Vector<double> sum[SK_PV] = {}, of_columns[SK_PV];
#pragma GCC unroll 4
    for (int v = 0; v < SK_PV; v++) of_columns[v] = load(x + top + v * kLanes);
    int64_t i = top;
    for (; i < below; i++, row += P)
#pragma GCC unroll 4
      for (int v = 0; v < SK_PV; v++) sum[v] += x[i] * load(row + v * kLanes);
    for (; i + kLanes <= n; i += kLanes, row += kLanes * P) {
      Vector<double> products[kLanes];
#pragma GCC unroll 8
      for (int r = 0; r < kLanes; r++) {
        products[r] = Vector<double>{};
#pragma GCC unroll 4
        for (int v = 0; v < SK_PV; v++) {
          const Vector<double> of_row = load(row + r * P + v * kLanes);
          sum[v] += x[i + r] * of_row;
          products[r] += of_row * of_columns[v];
        }
      }
      Transpose<double>::template stage<kLanes / 2>(products);
      Vector<double> total = load(y + i);
#pragma GCC unroll 8
      for (int r = 0; r < kLanes; r++) total += products[r];
      store(y + i, total);
    }
    for (; i < n; i++, row += P) {
      Vector<double> product = {};
#pragma GCC unroll 4
      for (int v = 0; v < SK_PV; v++) {
        const Vector<double> of_row = load(row + v * kLanes);
        sum[v] += x[i] * of_row;
        product += of_row * of_columns[v];
      }
      double total = 0;
      for (int l = 0; l < kLanes; l++) total += product[l];
      y[i] += total;
    }
#pragma GCC unroll 4
    for (int v = 0; v < SK_PV; v++)
      store(y + top + v * kLanes, load(y + top + v * kLanes) + sum[v]);
  }
}

// y_i += sum over k of by_k x_ki for i in [begin, end) and the lines k of x, `pitch` apart.
static void add_lines(int64_t lines, const double* x, int64_t pitch, const double* by,
                      int64_t begin, int64_t end, double* y) {
  constexpr int kLanes = Simd<double>::kLanes, kVectors = 4;
  int64_t i = begin;
  for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
    Vector<double> sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[v] = load(y + i + v * kLanes);
    const double* line = x + i;
    for (int64_t k = 0; k < lines; k++, line += pitch)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[v] += by[k] * load(line + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(y + i + v * kLanes, sum[v]);
  }
  for (; i < end; i++) {
    double sum = y[i];
    for (int64_t k = 0; k < lines; k++) sum += by[k] * x[k * pitch + i];
    y[i] = sum;
  }
}

// dots_k = sum over i in [begin, end) of x_ki y_i.
static void dot_lines(int64_t lines, const double* x, int64_t pitch, const double* y, int64_t begin,
                      int64_t end, double* dots) {
  constexpr int kLanes = Simd<double>::kLanes, kVectors = 4;
  for (int64_t k = 0; k < lines; k++) {
    const double* line = x + k * pitch;
    Vector<double> sum[kVectors] = {};
    int64_t i = begin;
    for (; i + kVectors * kLanes <= end; i += kVectors * kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        sum[v] += load(line + i + v * kLanes) * load(y + i + v * kLanes);
    const Vector<double> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double dot = 0;
    for (int l = 0; l < kLanes; l++) dot += all[l];
    for (; i < end; i++) dot += line[i] * y[i];
    dots[k] = dot;
  }
}

// value = sum over j in [begin, end) of z2_j / (d_j - origin - mu), slope = its derivative in mu.
static void secular_sums(const double* d, const double* z2, int64_t begin, int64_t end,
                         double origin, double mu, double* value, double* slope) {
  constexpr int kLanes = Simd<double>::kLanes, kVectors = 2;
  Vector<double> sum[kVectors] = {}, sum2[kVectors] = {};
  int64_t j = begin;
  for (; j + kVectors * kLanes <= end; j += kVectors * kLanes)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      const Vector<double> inverse = 1.0 / ((load(d + j + v * kLanes) - origin) - mu);
      const Vector<double> term = load(z2 + j + v * kLanes) * inverse;
      sum[v] += term;
      sum2[v] += term * inverse;
    }
  const Vector<double> all = sum[0] + sum[1], all2 = sum2[0] + sum2[1];
  double total = 0, total2 = 0;
  for (int l = 0; l < kLanes; l++) total += all[l], total2 += all2[l];
  for (; j < end; j++) {
    const double inverse = 1.0 / ((d[j] - origin) - mu), term = z2[j] * inverse;
    total += term;
    total2 += term * inverse;
  }
  *value = total;
  *slope = total2;
}
