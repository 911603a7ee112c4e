// One-sided Jacobi in fp64 on a pivoted Cholesky factor: the columns of L with A + s I = L Lᵀ are
// rotated until they are orthogonal, and are then sqrt(lambda + s) times the eigenvectors, so no
// second matrix is rotated.
#include <type_traits>

#include "../base/kernel_table.h"
#include "../base/launch.h"
#include "jacobi.h"

namespace spectral_kernels::cuda {
namespace {

constexpr double kUnitRoundoff64 = 0x1p-53, kRotated = 1e-15, kConverged = 1e-8;
constexpr int kMostSweeps = 30;

template <int kN>
struct Jacobi {
  static constexpr int kWarps = kN == 32 ? 8 : 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kPairs = kN / 2 / kWarps;              // that a warp rotates a round
  static constexpr int kTogether = kPairs == 4 ? 2 : kPairs;  // of them at a time
  static constexpr int kEach = kN / 32;                       // elements of a column in a lane
  static constexpr int kBytes = int((kN * kN + 3 * kN + 2 * kWarps) * sizeof(double));
};

DEVICE double warp_sum(double value) {
  for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// Number i of a round of a tournament of n players, n even: round by round every pair meets once.
DEVICE int player(int i, int round, int n) {
  const int turned = i - 1 + round;
  return i == 0 ? 0 : (turned >= n - 1 ? turned - (n - 1) : turned) + 1;
}

template <int kN>
__global__ void __launch_bounds__(Jacobi<kN>::kThreads, 1)
    eigenbasis_kernel(const __grid_constant__ Table table, const uint32_t* largest,
                      const int64_t* status, const EigenResults results) {
  using Size = Jacobi<kN>;
  DYNAMIC_SHARED(double, w);  // column j from j kN on
  double *squares = w + kN * kN, *values = squares + kN, *pivots = values + kN,
         *scratch = pivots + kN;
  const Place at = place(table, blockIdx.x, [](const Entry&) { return int64_t(1); });
  const Entry& e = *at.entry;
  const int n = e.rows, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t matrix = e.first + at.matrix, from = at.matrix * e.source.batch;
  if (status != nullptr && status[matrix] >= 0) return;
  const auto symmetric = [&](int i, int j) {
    return .5 * (double(read(e.source, from + i * e.source.row + j * e.source.column)) +
                 double(read(e.source, from + j * e.source.row + i * e.source.column)));
  };
  double* out_values = results.values + matrix * n;
  double* out_vectors = results.vectors + e.square + at.matrix * n * n;
  const auto fill = [&](double value, double diagonal, int64_t sweeps) {
    for (int i = tid; i < n * n; i += Size::kThreads)
      out_vectors[i] = i / n == i % n ? diagonal : value;
    for (int i = tid; i < n; i += Size::kThreads) out_values[i] = value;
    if (tid == 0) results.sweeps[matrix] = sweeps;
  };
  const uint32_t bits = largest[matrix];
  const double nan = double(float_of(0x7fc00000u));
  if (!finite(bits)) return fill(nan, nan, -1);
  if (bits == 0) return fill(0, 1, 0);

  // || A ||_inf bounds every eigenvalue
  double sum = 0;
  if (tid < n)
    for (int j = 0; j < n; j++) sum += fabs(symmetric(tid, j));
  if (tid < kN) values[tid] = sum;
  __syncthreads();
  double bound = 0;
  for (int i = 0; i < n; i++) bound = values[i] > bound ? values[i] : bound;

  // Factor of A + s I, rows unpermuted. s is raised until all pivots are clear of rounding noise:
  // for a factor of full rank, for one of low rank in fp32, for any matrix.
  const double shifts[3] = {16 * n * kUnitRoundoff64 * bound, 0x1p-18 * bound, 1.01 * bound};
  for (int attempt = 0; attempt < 3; attempt++) {
    const double shift = shifts[attempt];
    double own = tid < n ? symmetric(tid, tid) + shift : 0;  // what is left of the diagonal
    bool used = tid >= n;
    int k = 0;
    for (; k < n; k++) {
      if (tid < kN) pivots[tid] = used ? -1 : own;
      __syncthreads();
      int pivot = 0;
      for (int i = 1; i < n; i++) pivot = pivots[i] > pivots[pivot] ? i : pivot;
      const double most = pivots[pivot];
      if (!(most > .5 * shift)) break;
      if (tid < n) {
        double value = used ? 0 : symmetric(tid, pivot) + (tid == pivot ? shift : 0.);
        if (!used)
          for (int j = 0; j < k; j++) value -= w[j * kN + tid] * w[j * kN + pivot];
        value = tid == pivot ? sqrt(most) : value / sqrt(most);
        w[k * kN + tid] = value;
        own -= value * value;
        used = used || tid == pivot;
      }
      __syncthreads();
    }
    if (k == n) break;
    __syncthreads();
  }
  const int even = (n + 1) / 2 * 2;
  for (int j = warp; j < even; j += Size::kWarps)
    for (int i = lane; i < kN; i += 32)
      if (i >= n || j >= n) w[j * kN + i] = 0;

  int sweeps = 0;
  for (bool more = true; more && sweeps < kMostSweeps; sweeps++) {
    for (int j = warp; j < even; j += Size::kWarps) {
      double square = 0;
      for (int i = lane; i < kN; i += 32) square += w[j * kN + i] * w[j * kN + i];
      square = warp_sum(square);
      if (lane == 0) squares[j] = square;
    }
    double worst = 0;  // of the squared cosines
    __syncthreads();
    for (int round = 0; round < even - 1; round++) {
      for (int first = 0; first < Size::kPairs; first += Size::kTogether) {
        double a[Size::kTogether][Size::kEach], b[Size::kTogether][Size::kEach],
            dot[Size::kTogether];
        int p[Size::kTogether], q[Size::kTogether];
#pragma unroll
        for (int i = 0; i < Size::kTogether; i++) {
          const int pair = warp * Size::kPairs + first + i;
          const bool exists = pair < even / 2;
          p[i] = exists ? player(pair, round, even) : 0;
          q[i] = exists ? player(even - 1 - pair, round, even) : 0;
          dot[i] = 0;
          if (exists)
#pragma unroll
            for (int k = 0; k < Size::kEach; k++) {
              a[i][k] = w[p[i] * kN + k * 32 + lane];
              b[i][k] = w[q[i] * kN + k * 32 + lane];
              dot[i] += a[i][k] * b[i][k];
            }
        }
#pragma unroll
        for (int i = 0; i < Size::kTogether; i++) dot[i] = warp_sum(dot[i]);
#pragma unroll
        for (int i = 0; i < Size::kTogether; i++) {
          if (p[i] == q[i]) continue;
          const double alpha = squares[p[i]], beta = squares[q[i]], product = alpha * beta;
          const double cosine = product > 0 ? dot[i] * dot[i] / product : 0;
          worst = cosine > worst ? cosine : worst;
          if (!(cosine > kRotated * kRotated)) continue;  // the same in all lanes
          const double zeta = (beta - alpha) / (2 * dot[i]);
          const double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
          const double c = 1 / sqrt(1 + t * t), s = c * t;
#pragma unroll
          for (int k = 0; k < Size::kEach; k++) {
            w[p[i] * kN + k * 32 + lane] = c * a[i][k] - s * b[i][k];
            w[q[i] * kN + k * 32 + lane] = s * a[i][k] + c * b[i][k];
          }
          __syncwarp();  // every lane has read both squares
          if (lane == 0) {
            squares[p[i]] = alpha - t * dot[i];
            squares[q[i]] = beta + t * dot[i];
          }
        }
      }
      __syncthreads();
    }
    if (lane == 0) scratch[warp] = worst;
    __syncthreads();
    more = false;
    for (int i = 0; i < Size::kWarps; i++) more = more || scratch[i] > kConverged * kConverged;
  }
  if (sweeps == kMostSweeps) return fill(nan, nan, -1);

  // Rayleigh quotients, signs, and the descending order
  for (int j = warp; j < n; j += Size::kWarps) {
    double u[Size::kEach], square = 0, value = 0;
#pragma unroll
    for (int k = 0; k < Size::kEach; k++) {
      u[k] = w[j * kN + k * 32 + lane];
      square += u[k] * u[k];
    }
    const double length = sqrt(warp_sum(square));
    for (int i = 0; i < n; i++) {
      double row = 0;
#pragma unroll
      for (int k = 0; k < Size::kEach; k++)
        if (k * 32 + lane < n) row += symmetric(i, k * 32 + lane) * u[k];
      value += w[j * kN + i] * row;
    }
    value = warp_sum(value) / (length * length);
    double most = -1;
    int first = kN;
#pragma unroll
    for (int k = 0; k < Size::kEach; k++)
      if (fabs(u[k]) > most) {
        most = fabs(u[k]);
        first = k * 32 + lane;
      }
    for (int mask = 16; mask; mask >>= 1) {
      const double other = __shfl_xor_sync(~0u, most, mask);
      const int place_of_other = __shfl_xor_sync(~0u, first, mask);
      if (other > most || (other == most && place_of_other < first)) {
        most = other;
        first = place_of_other;
      }
    }
    if (lane == 0) {
      values[j] = value;
      squares[j] = (w[j * kN + first] < 0 ? -1 : 1) / length;
    }
  }
  __syncthreads();
  for (int j = warp; j < n; j += Size::kWarps) {
    int rank = 0;
    for (int i = lane; i < n; i += 32)
      rank += values[i] > values[j] || (values[i] == values[j] && i < j);
    for (int mask = 16; mask; mask >>= 1) rank += __shfl_xor_sync(~0u, rank, mask);
    for (int i = lane; i < n; i += 32) out_vectors[i * n + rank] = w[j * kN + i] * squares[j];
    if (lane == 0) out_values[rank] = values[j];
  }
  if (tid == 0) results.sweeps[matrix] = sweeps;
}

template <class F>
int with_size(int rows, F f) {
  if (rows <= 32) return f(std::integral_constant<int, 32>());
  if (rows <= 64) return f(std::integral_constant<int, 64>());
  if (rows <= 96) return f(std::integral_constant<int, 96>());
  return f(std::integral_constant<int, 128>());
}

}  // namespace

int64_t jacobi_bytes(int rows) {
  return with_size(rows, [](auto n) { return Jacobi<decltype(n)::value>::kBytes; });
}

int launch_eigenbasis(const std::vector<Entry>& entries, const uint32_t* largest,
                      const int64_t* status, const EigenResults& results, void* stream) {
  if (entries.empty()) return 0;
  return with_size(entries[0].rows, [&](auto n) {
    constexpr int kN = decltype(n)::value;
    constexpr auto kernel = eigenbasis_kernel<kN>;
    constexpr int kBytes = Jacobi<kN>::kBytes;
    if (const int error = allow_shared<kernel>(kBytes); error != 0) return error;
    return for_each_table(
        entries, [](const Entry&) { return int64_t(1); },
        [&](const Table& list, unsigned blocks) {
          LAUNCH(kernel, dim3(blocks), dim3(Jacobi<kN>::kThreads), kBytes, stream, list, largest,
                 status, results);
          return launched();
        });
  });
}

}  // namespace spectral_kernels::cuda
