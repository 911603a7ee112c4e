// reference/deva.py is the specification. Sums of squares are fp64, in two stages: over tiles, and
// over the tiles of a line.
#include "../base/launch.h"
#include "../base/reduce.h"
#include "../eigenbasis/elements.h"
#include "passes.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = kElementThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kDown = 32, kAcross = 128;  // a tile, in the order of memory
static_assert(kThreads == 2 * kAcross);

// A matrix in the order of memory, as tiles; sums of M'², then of G'².
struct Tiles {
  bool by_columns;
  int64_t slow, fast;    // lengths
  int64_t down, across;  // tiles

  HOST_DEVICE int64_t of_fast() const { return 2 * down * fast; }
  HOST_DEVICE int64_t of_slow() const { return 2 * across * slow; }
  HOST_DEVICE int64_t sums() const { return of_fast() + of_slow() + down * across; }
};

HOST_DEVICE Tiles tiles_of(const MomentEntry& e) {
  Tiles t;
  t.by_columns = e.moment.row < e.moment.column;
  t.slow = t.by_columns ? e.columns : e.rows;
  t.fast = t.by_columns ? e.rows : e.columns;
  t.down = (t.slow + kDown - 1) / kDown;
  t.across = (t.fast + kAcross - 1) / kAcross;
  return t;
}
HOST_DEVICE int64_t tile_parts(const Varied& e) {
  const Tiles t = tiles_of(e);
  return t.down * t.across;
}
HOST_DEVICE int64_t lines_of(const MomentEntry& e) { return e.rows + e.columns; }
HOST_DEVICE int64_t line_parts(const Varied& e) { return (lines_of(e) + kThreads - 1) / kThreads; }
HOST_DEVICE int64_t element_parts(const Varied& e) { return moment_parts(e); }

DEVICE float sign_of(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x; }

DEVICE float mixed(const Deva& deva, float m, float g) {
  return deva.nesterov ? averaged(deva.adam.first, m, g) : m;
}

// sqrt(e / v) with its eps from sqrt(e).
DEVICE float ratio(const Deva& deva, float top, float v, float eps) {
  const float bottom = deva.outside ? sqrtf(v) + eps : sqrtf(v + eps);
  return bottom == 0 && top == 0 ? 1.f : top / bottom;
}

constexpr size_t kTileBytes = kWarps * kAcross * 2 * sizeof(double);

__global__ void __launch_bounds__(kThreads, 1)
    moments_kernel(const __grid_constant__ TableOf<Varied> table, const Deva deva,
                   const DevaBuffers buffers) {
  DYNAMIC_SHARED(double, columns);
  double* warps = columns + kTileBytes / sizeof(double);
  const auto at = place(table, blockIdx.x, [](const Varied& e) { return tile_parts(e); });
  const Varied& e = *at.entry;
  const Tiles t = tiles_of(e);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile_slow = at.part / t.across, tile_fast = at.part % t.across;
  double* sums = buffers.tiles + e.tile + at.matrix * t.sums();
  const bool energies = deva.variance != Variance::kNone;
  const bool total = deva.relative && energies && deva.variance != Variance::kLowMemory;
  double of_fast[kAcross / 32][2] = {}, squares = 0;
  uint32_t most = 0;
  for (int i = warp; i < kDown; i += kWarps) {
    const int64_t slow = tile_slow * kDown + i;
    double of_slow[2] = {};
#pragma unroll
    for (int k = 0; k < kAcross / 32; k++) {
      const int64_t fast = tile_fast * kAcross + 32 * k + lane;
      if (slow >= t.slow || fast >= t.fast) continue;
      const int64_t row = t.by_columns ? fast : slow, column = t.by_columns ? slow : fast;
      const float g = gradient_of(e, deva.adam, at.matrix, row, column);
      const float m = new_moment(e, deva.adam, g, at.matrix, row, column);
      const float n = mixed(deva, m, g);
      write_at(e.direction, at.matrix, row, column, deva.sign ? sign_of(n) : n);
      write_at(e.new_moment, at.matrix, row, column, m);
      most = larger(most, size_bits(m));
      const double energy[2] = {double(m) * double(m), double(g) * double(g)};
#pragma unroll
      for (int q = 0; q < 2; q++) {
        of_slow[q] += energy[q];
        of_fast[k][q] += energy[q];
      }
      if (total) squares += double(read(e.squares, index(e.squares, at.matrix, row, column)));
    }
    if (!energies) continue;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      for (int mask = 16; mask; mask >>= 1) of_slow[q] += __shfl_xor_sync(~0u, of_slow[q], mask);
      if (lane == 0 && slow < t.slow)
        sums[t.of_fast() + (q * t.across + tile_fast) * t.slow + slow] = of_slow[q];
    }
  }
  if (energies) {
#pragma unroll
    for (int k = 0; k < kAcross / 32; k++)
#pragma unroll
      for (int q = 0; q < 2; q++) columns[(warp * 2 + q) * kAcross + 32 * k + lane] = of_fast[k][q];
    __syncthreads();
    const int q = threadIdx.x / kAcross, own = threadIdx.x % kAcross;
    double all = 0;
    for (int w = 0; w < kWarps; w++) all += columns[(w * 2 + q) * kAcross + own];
    const int64_t fast = tile_fast * kAcross + own;
    if (fast < t.fast) sums[(q * t.down + tile_slow) * t.fast + fast] = all;
  }
  if (total) {
    squares = sum_of_block<kThreads>(squares, warps);
    if (threadIdx.x == 0) sums[t.of_fast() + t.of_slow() + at.part] = squares;
  }
  raise_largest<kThreads>(most, reinterpret_cast<uint32_t*>(warps + kWarps),
                          buffers.largest + e.first + at.matrix);
}

// The energies of M' and G' on one line, added over tiles in their order.
DEVICE void add_tiles(const Tiles& t, const double* sums, bool is_slow, int64_t at, double* out) {
  const int64_t length = is_slow ? t.slow : t.fast, count = is_slow ? t.across : t.down;
  if (is_slow) sums += t.of_fast();
  for (int q = 0; q < 2; q++) {
    out[q] = 0;
    for (int64_t i = 0; i < count; i++) out[q] += sums[(q * count + i) * length + at];
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    energies_kernel(const __grid_constant__ TableOf<Varied> table, const Deva deva,
                    const DevaBuffers buffers) {
  DYNAMIC_SHARED(double, warps);
  const auto at = place(table, blockIdx.x, [](const Varied& e) { return line_parts(e); });
  const Varied& e = *at.entry;
  const Tiles t = tiles_of(e);
  const bool low = deva.variance == Variance::kLowMemory;
  const int64_t matrix = e.first + at.matrix, parts = line_parts(*at.entry);
  const double* sums = buffers.tiles + e.tile + at.matrix * t.sums();
  const Numbers numbers = buffers.numbers[matrix];
  const int64_t line = at.part * kThreads + threadIdx.x;
  const bool is_row = line < e.rows;
  double share = 0;
  uint32_t most = 0;
  if (line < lines_of(e)) {
    double energy[2];
    add_tiles(t, sums, is_row != t.by_columns, is_row ? line : line - e.rows, energy);
    energy[0] /= numbers.m_bias * numbers.m_bias;
    const double top = sqrt(energy[deva.variance == Variance::kInstant ? 1 : 0]);
    float seen;
    if (low) {
      const float old = read(e.squares, index(e.squares, at.matrix, 0, line));
      const float v = averaged(deva.adam.second, old, float(energy[1]));
      write_at(e.new_squares, at.matrix, 0, line, v);
      most = size_bits(v);
      seen = float(double(v) / numbers.v_bias);
      share = double(seen);
    } else {
      share = sqrt(energy[deva.variance == Variance::kMomentum ? 0 : 1]);
      seen = float(share);
    }
    buffers.lines[e.line + at.matrix * lines_of(e) + line] = {seen, float(top)};
  }
  raise_largest<kThreads>(most, reinterpret_cast<uint32_t*>(warps + 4 * kWarps),
                          buffers.largest + matrix);
  float* eps = buffers.eps + 2 * matrix;
  if (!deva.relative) {
    if (at.part == 0 && threadIdx.x < 2) eps[threadIdx.x] = deva.adam.eps;
    return;
  }
  double* shares = buffers.shares + e.share + at.matrix * 2 * parts;
  const double rows = sum_of_block<kThreads>(is_row ? share : 0, warps);
  const double columns = sum_of_block<kThreads>(is_row ? 0 : share, warps + kWarps);
  if (threadIdx.x == 0) {
    shares[at.part] = rows;
    shares[parts + at.part] = columns;
  }
  if (!last_to_arrive(buffers.arrived + matrix, parts,
                      reinterpret_cast<int*>(warps + 4 * kWarps + kWarps / 2)))
    return;
  const double all_rows = total_of<kThreads>(shares, parts, warps + 2 * kWarps);
  const double all_columns = total_of<kThreads>(shares + parts, parts, warps + 3 * kWarps);
  if (low) {
    if (threadIdx.x != 0) return;
    eps[0] = float(deva.adam.eps * all_rows / double(e.rows));
    eps[1] = float(deva.adam.eps * all_columns / double(e.columns));
    return;
  }
  const double old = total_of<kThreads>(sums + t.of_fast() + t.of_slow(), t.down * t.across, warps);
  if (threadIdx.x != 0) return;
  const Average& second = deva.adam.second;
  const double mean = (double(second.old) * old + double(second.fresh) * all_rows * all_columns) /
                      (double(e.rows) * double(e.columns));
  eps[0] = eps[1] = float(deva.adam.eps * mean / numbers.v_bias);
}

__global__ void __launch_bounds__(kThreads, 1)
    adaptation_kernel(const __grid_constant__ TableOf<Varied> table, const Deva deva,
                      const DevaBuffers buffers) {
  DYNAMIC_SHARED(uint32_t, warps);
  const auto at = place(table, blockIdx.x, [](const Varied& e) { return element_parts(e); });
  const Varied& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  const Line* lines = buffers.lines + e.line + at.matrix * lines_of(e);
  const Line* of_columns = lines + e.rows;
  const float* eps = buffers.eps + 2 * matrix;
  const float v_scale = float(1 / buffers.numbers[matrix].v_bias);
  uint32_t most = 0;
  each_element(e.rows, e.columns, by_columns(e.direction), at.part, [&](int64_t i, int64_t j) {
    float gamma = 1;
    if (deva.variance == Variance::kLowMemory) {
      gamma = sqrtf(ratio(deva, lines[i].top, lines[i].seen, eps[0])) *
              sqrtf(ratio(deva, of_columns[j].top, of_columns[j].seen, eps[1]));
    } else if (deva.variance != Variance::kNone) {
      const float old = read(e.squares, index(e.squares, at.matrix, i, j));
      const float seen = lines[i].seen * of_columns[j].seen;
      const float v = averaged(deva.adam.second, old, seen);
      write_at(e.new_squares, at.matrix, i, j, v);
      most = larger(most, size_bits(v));
      // One root of the product: two would not scale exactly with an odd power of two.
      gamma = ratio(deva, sqrtf(lines[i].top * of_columns[j].top), v * v_scale, eps[0]);
    }
    const float o = read(e.direction, index(e.direction, at.matrix, i, j));
    write_at(e.direction, at.matrix, i, j, e.scale * gamma * o);
  });
  raise_largest<kThreads>(most, warps, buffers.largest + matrix);
}

// One element of norm "linf".
struct Elementwise {
  float m, g, v, top;
};

DEVICE Elementwise elementwise(const MomentEntry& e, const Deva& deva, const Numbers& numbers,
                               int64_t matrix, int64_t row, int64_t column) {
  Elementwise x;
  x.g = gradient_of(e, deva.adam, matrix, row, column);
  x.m = new_moment(e, deva.adam, x.g, matrix, row, column);
  x.v = x.top = 0;
  if (deva.variance == Variance::kNone) return x;
  const float unbiased = x.m / float(numbers.m_bias);
  const float seen = deva.variance == Variance::kMomentum ? unbiased : x.g;
  x.top = fabsf(deva.variance == Variance::kInstant ? x.g : unbiased);
  const float old = read(e.squares, index(e.squares, matrix, row, column));
  x.v = averaged(deva.adam.second, old, seen * seen);
  return x;
}

__global__ void __launch_bounds__(kThreads, 1)
    mean_kernel(const __grid_constant__ TableOf<Varied> table, const Deva deva,
                const DevaBuffers buffers) {
  DYNAMIC_SHARED(double, warps);
  const auto at = place(table, blockIdx.x, [](const Varied& e) { return element_parts(e); });
  const Varied& e = *at.entry;
  const int64_t matrix = e.first + at.matrix, parts = element_parts(*at.entry);
  const Numbers numbers = buffers.numbers[matrix];
  double share = 0;
  each_element(e.rows, e.columns, by_columns(e.moment), at.part, [&](int64_t i, int64_t j) {
    share += double(elementwise(e, deva, numbers, at.matrix, i, j).v);
  });
  share = sum_of_block<kThreads>(share, warps);
  double total;
  if (!last_total<kThreads>(share, buffers.shares + e.share + at.matrix * parts, at.part, parts,
                            buffers.arrived + matrix, warps, total))
    return;
  if (threadIdx.x == 0)
    buffers.eps[2 * matrix] =
        float(deva.adam.eps * total / (double(e.rows) * double(e.columns)) / numbers.v_bias);
}

__global__ void __launch_bounds__(kThreads, 1)
    signs_kernel(const __grid_constant__ TableOf<Varied> table, const Deva deva,
                 const DevaBuffers buffers) {
  DYNAMIC_SHARED(uint32_t, warps);
  const auto at = place(table, blockIdx.x, [](const Varied& e) { return element_parts(e); });
  const Varied& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  const Numbers numbers = buffers.numbers[matrix];
  const float v_bias = float(numbers.v_bias);
  const float eps = deva.relative ? buffers.eps[2 * matrix] : deva.adam.eps;
  uint32_t most = 0;
  each_element(e.rows, e.columns, by_columns(e.moment), at.part, [&](int64_t i, int64_t j) {
    const Elementwise x = elementwise(e, deva, numbers, at.matrix, i, j);
    const bool adapts = deva.variance != Variance::kNone;
    const float gamma = adapts ? ratio(deva, x.top, x.v / v_bias, eps) : 1.f;
    write_at(e.direction, at.matrix, i, j, e.scale * gamma * sign_of(mixed(deva, x.m, x.g)));
    write_at(e.new_moment, at.matrix, i, j, x.m);
    write_at(e.new_squares, at.matrix, i, j, x.v);
    most = larger(most, larger(size_bits(x.m), size_bits(x.v)));
  });
  raise_largest<kThreads>(most, warps, buffers.largest + matrix);
}

template <auto kKernel, class Parts>
int launch(size_t bytes, const std::vector<Varied>& entries, Parts parts, const Deva& deva,
           const DevaBuffers& buffers, void* stream) {
  return for_each_table(entries, parts, [&](const TableOf<Varied>& table, unsigned blocks) {
    LAUNCH(kKernel, dim3(blocks), dim3(kThreads), bytes, stream, table, deva, buffers);
    return launched();
  });
}

}  // namespace

DevaSizes place_varied(std::vector<Varied>& entries) {
  DevaSizes sizes;
  for (Varied& e : entries) {
    e.tile = sizes.tiles;
    e.line = sizes.lines;
    e.share = sizes.shares;
    sizes.tiles += e.count * tiles_of(e).sums();
    sizes.lines += e.count * lines_of(e);
    const int64_t of_lines = 2 * line_parts(e), of_elements = element_parts(e);
    sizes.shares += e.count * (of_lines > of_elements ? of_lines : of_elements);
  }
  return sizes;
}

int launch_moments(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                   void* stream) {
  return launch<moments_kernel>(kTileBytes + 2 * kWarps * sizeof(double), entries, tile_parts, deva,
                                buffers, stream);
}

int launch_energies(const std::vector<Varied>& entries, const Deva& deva,
                    const DevaBuffers& buffers, void* stream) {
  return launch<energies_kernel>(5 * kWarps * sizeof(double), entries, line_parts, deva, buffers,
                                 stream);
}

int launch_adaptation(const std::vector<Varied>& entries, const Deva& deva,
                      const DevaBuffers& buffers, void* stream) {
  return launch<adaptation_kernel>(kWarps * sizeof(uint32_t), entries, element_parts, deva, buffers,
                                   stream);
}

int launch_mean(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                void* stream) {
  return launch<mean_kernel>(kReduceBytes<kThreads>, entries, element_parts, deva, buffers, stream);
}

int launch_signs(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                 void* stream) {
  return launch<signs_kernel>(kWarps * sizeof(uint32_t), entries, element_parts, deva, buffers,
                              stream);
}

}  // namespace spectral_kernels::cuda
