// Multi-tensor passes: max-abs guard, momentum with scaling and packing, step counts.
#include "delivery.h"
#include "kernel_table.h"
#include "launch.h"
#include "list_step.h"
#include "reduce.h"
#include "words.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// largest

constexpr int64_t kScanLines = 8, kScanColumns = 4096;  // that a block reads

// A batch of lines; contiguous matrices are one line.
struct Scan {
  int64_t lines, length, line, element;
};

HOST_DEVICE int64_t scan_parts(const Scan& s) {
  return ((s.lines + kScanLines - 1) / kScanLines) * ((s.length + kScanColumns - 1) / kScanColumns);
}

HOST_DEVICE Scan scan_of(const Entry& e, const Matrices& m) {
  const bool transposed = m.row < m.column;
  Scan s{transposed ? e.columns : int64_t(e.rows), transposed ? int64_t(e.rows) : e.columns,
         transposed ? m.column : m.row, transposed ? m.row : m.column};
  if (s.line == s.length * s.element) {
    s.length *= s.lines;
    s.lines = 1;
  }
  return s;
}

HOST_DEVICE int64_t scan_parts(const Entry& e, Of of) {
  int64_t parts = 0;
  if (of != Of::kMomentum) parts += scan_parts(scan_of(e, e.source));
  if (of != Of::kSource && e.momentum.data != nullptr) parts += scan_parts(scan_of(e, e.momentum));
  if (of == Of::kAll) parts += scan_parts(scan_of(e, e.target));
  return parts;
}

__global__ void __launch_bounds__(kThreads)
    largest_kernel(const __grid_constant__ Table table, Of of, uint32_t* largest,
                   uint32_t* targets) {
  DYNAMIC_SHARED(uint32_t, warps);
  const Place at = place(table, blockIdx.x, [&](const Entry& e) { return scan_parts(e, of); });
  const int64_t of_source = of == Of::kMomentum ? 0 : scan_parts(*at.entry, Of::kSource);
  const int64_t of_both = of == Of::kAll ? scan_parts(*at.entry, Of::kBoth) : at.part + 1;
  const bool second = at.part >= of_source, third = at.part >= of_both;
  const int64_t part = at.part - (third ? of_both : second ? of_source : 0);
  const Matrices& m = third ? at.entry->target : second ? at.entry->momentum : at.entry->source;
  const Scan s = scan_of(*at.entry, m);
  const int64_t across = (s.length + kScanColumns - 1) / kScanColumns;
  const int64_t line0 = part / across * kScanLines, column0 = part % across * kScanColumns;
  const int64_t lines = line0 + kScanLines < s.lines ? line0 + kScanLines : s.lines;
  const int64_t columns = column0 + kScanColumns < s.length ? column0 + kScanColumns : s.length;
  uint32_t most = 0;
  for (int64_t i = line0; i < lines; i++) {
    const int64_t start = at.matrix * m.batch + i * s.line;
    int64_t j = column0 + threadIdx.x;
    if (m.type == Type::kF32 && s.element == 1) {
      const float* x = static_cast<const float*>(m.data) + start;
      if (reinterpret_cast<uintptr_t>(x + column0) % 16 == 0) {
        const int64_t whole = column0 + (columns - column0) / 4 * 4;
        for (int64_t k = column0 + 4 * int64_t(threadIdx.x); k < whole; k += 4 * kThreads) {
          const float4 v = *reinterpret_cast<const float4*>(x + k);
          most = larger(most, larger(larger(size_bits(v.x), size_bits(v.y)),
                                     larger(size_bits(v.z), size_bits(v.w))));
        }
        j = whole + threadIdx.x;
      }
    }
    for (; j < columns; j += kThreads)
      most = larger(most, size_bits(read(m, start + j * s.element)));
  }
  most = largest_of_block<kThreads>(most, warps);
  if (threadIdx.x != 0) return;
  const int64_t matrix = at.entry->first + at.matrix;
  if (third && targets != nullptr) atomicMax(targets + matrix, most);
  if (!third || !finite(most)) atomicMax(largest + matrix, most);
}

// prologue

// A thread makes 8 packed elements of one row. The lanes of a warp follow the memory: 256 columns
// of a row, or 8 columns of 32 rows.
struct Tile {
  int64_t rows, columns;
};

HOST_DEVICE bool by_columns(const Entry& e) {
  const Matrices& m = e.momentum.data == nullptr ? e.source : e.momentum;
  return m.row < m.column;
}
HOST_DEVICE Tile tile_of(const Entry& e) { return by_columns(e) ? Tile{32, 64} : Tile{8, 256}; }
HOST_DEVICE int64_t tiles_across(const Entry& e) {
  const Tile t = tile_of(e);
  return (e.packed.line + t.columns - 1) / t.columns;
}
HOST_DEVICE int64_t prologue_parts(const Entry& e) {
  const Tile t = tile_of(e);
  return (e.rows + t.rows - 1) / t.rows * tiles_across(e);
}

// Where a thread's 8 elements begin.
struct Spot {
  int64_t row, column;
};

DEVICE Spot spot_of(const Place& at) {
  const Entry& e = *at.entry;
  const int64_t across = tiles_across(e);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool transposed = by_columns(e);
  const Tile tile = tile_of(e);
  return {at.part / across * tile.rows + (transposed ? lane : warp),
          at.part % across * tile.columns + 8 * (transposed ? warp : lane)};
}

// Eight elements of a row from `at` on, as far as there are `count`.
DEVICE bool whole_words(const Matrices& m, int64_t at, int64_t count) {
  return m.column == 1 && count >= 8 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         at * bytes_of(m.type) % 16 == 0;
}

DEVICE void read_eight(const Matrices& m, int64_t at, int64_t count, float (&x)[8]) {
  if (whole_words(m, at, count)) {
    with_type(m.type, [&](auto type) { load_eight<decltype(type)::value>(m.data, at, x); });
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < count) x[i] = read(m, at + i * m.column);
}

DEVICE void write_eight(const Matrices& m, int64_t at, int64_t count, const float (&x)[8]) {
  if (whole_words(m, at, count)) {
    with_type(m.type, [&](auto type) { store_eight<decltype(type)::value>(m.data, at, x); });
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < count) write(m, at + i * m.column, x[i]);
}

// The block's share of a norm. Whichever block arrives last adds all shares, in their order.
DEVICE void add_to_norm(const Place& at, float squares, uint32_t largest, bool f16,
                        const Norms& norms, double* warps) {
  const Entry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix, parts = prologue_parts(e);
  double* shares = norms.squares + e.packed.norm + at.matrix * parts;
  const double share = sum_of_block<kThreads>(double(squares), warps);
  double total;
  if (!last_total<kThreads>(share, shares, at.part, parts, norms.arrived + matrix, warps, total))
    return;
  if (threadIdx.x != 0) return;
  norms.factor[matrix] =
      inverse_of(divisor_of(sqrt(total) * norms.norm_factor, norms.eps, pack_shift(largest, f16)));
}

__global__ void __launch_bounds__(kThreads)
    prologue_kernel(const __grid_constant__ Table table, const Prologue options,
                    const uint32_t* largest, uint16_t* packed, const Norms norms) {
  DYNAMIC_SHARED(double, warps);
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return prologue_parts(e); });
  const Entry& e = *at.entry;
  const Spot spot = spot_of(at);
  const int64_t row = spot.row, column = spot.column;
  const bool inside = row < e.rows && column < e.packed.line;

  const uint32_t most = largest[e.first + at.matrix];
  const bool usable = finite(most);
  const bool keep = !usable && options.update.nonfinite == NonFinite::kSkip;
  const bool later = doubtful(options.update, e, e.first + at.matrix);
  const PowerOfTwo scaled(pack_shift(most, options.f16));
  const Matrices &source = e.source, &momentum = e.momentum;
  const int64_t count = inside && !keep ? e.columns - column : 0;
  float g[8] = {}, m[8] = {};
  if (count > 0) {
    read_eight(source, at.matrix * source.batch + row * source.row + column * source.column, count,
               g);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = options.maximize ? -g[i] : g[i];
    if (momentum.data != nullptr) {
      const int64_t into =
          at.matrix * momentum.batch + row * momentum.row + column * momentum.column;
      read_eight(momentum, into, count, m);
#pragma unroll
      for (int i = 0; i < 8; i++) m[i] = averaged(options.momentum, m[i], g[i]);
      if (!later) write_eight(momentum, into, count, m);
    }
  }
  uint32_t high[4], low[4];
  float squares = 0;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    float x[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = 2 * pair + i;
      if (j >= count) continue;
      const float value = momentum.data == nullptr ? g[j]
                          : options.nesterov       ? averaged(options.momentum, m[j], g[j])
                                                   : m[j];
      x[i] = usable ? scaled(value) : 0.f;
      squares += x[i] * x[i];
    }
    high[pair] = options.f16 ? pack_f16(x[0], x[1]) : pack_bf16(x[0], x[1]);
    const float2 kept = options.f16 ? unpack_f16(high[pair]) : unpack_bf16(high[pair]);
    low[pair] = options.f16 ? pack_f16(x[0] - kept.x, x[1] - kept.y)
                            : pack_bf16(x[0] - kept.x, x[1] - kept.y);
  }
  if (inside) {
    const int64_t size = int64_t(e.rows) * e.packed.line;
    uint16_t* out =
        packed + e.packed.plane + at.matrix * size * options.planes + row * e.packed.line + column;
    *reinterpret_cast<uint4*>(out) = make_uint4(high[0], high[1], high[2], high[3]);
    if (options.planes == 2)
      *reinterpret_cast<uint4*>(out + size) = make_uint4(low[0], low[1], low[2], low[3]);
  }
  if (norms.factor != nullptr) add_to_norm(at, squares, most, options.f16, norms, warps);
}

__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const __grid_constant__ Table table, const Prologue options,
                    const uint32_t* largest) {
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return prologue_parts(e); });
  const Entry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  if (!doubtful(options.update, e, matrix) || kept(largest[matrix], options.update.nonfinite))
    return;
  const Spot spot = spot_of(at);
  if (spot.row >= e.rows) return;
  const Matrices &source = e.source, &momentum = e.momentum;
  const int64_t from = at.matrix * source.batch + spot.row * source.row;
  const int64_t into = at.matrix * momentum.batch + spot.row * momentum.row;
  for (int64_t j = spot.column; j < spot.column + 8 && j < e.columns; j++) {
    const float raw = read(source, from + j * source.column);
    const int64_t place_of_m = into + j * momentum.column;
    write(momentum, place_of_m,
          averaged(options.momentum, read(momentum, place_of_m), options.maximize ? -raw : raw));
  }
}

// count

DEVICE void add_one(const Counter& c, int64_t i) {
  if (c.integer)
    static_cast<int64_t*>(c.steps)[i] += 1;
  else if (c.type == Type::kF64)
    static_cast<double*>(c.steps)[i] += 1;
  else
    static_cast<float*>(c.steps)[i] += 1;
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ CounterTable table, NonFinite nonfinite,
                 const uint32_t* largest, unsigned long long* skipped) {
  DYNAMIC_SHARED(int64_t, warps);
  const Counter& c = table.counters[blockIdx.x];
  int64_t skips = 0;
  for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
    const bool skip = kept(largest[c.first + i], nonfinite);
    skips += skip;
    if (!skip && c.each) add_one(c, i);
  }
  for (int mask = 16; mask; mask >>= 1) skips += __shfl_xor_sync(~0u, skips, mask);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = skips;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; w++) skips += warps[w];
  if (!c.each && c.steps != nullptr && skips < c.count) add_one(c, 0);
  if (skips > 0) atomicAdd(skipped, static_cast<unsigned long long>(skips));
}

}  // namespace

int launch_largest(const std::vector<Entry>& entries, Of of, uint32_t* largest, void* stream,
                   uint32_t* targets) {
  return for_each_table(
      entries, [&](const Entry& e) { return scan_parts(e, of); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(largest_kernel, dim3(blocks), dim3(kThreads), kThreads / 32 * sizeof(uint32_t),
               stream, table, of, largest, targets);
        return launched();
      });
}

int64_t place_norms(std::vector<Entry>& entries) {
  int64_t parts = 0;
  for (Entry& e : entries) {
    e.packed.norm = parts;
    parts += e.count * prologue_parts(e);
  }
  return parts;
}

int launch_prologue(const std::vector<Entry>& entries, const Prologue& options,
                    const uint32_t* largest, uint16_t* packed, const Norms& norms, void* stream) {
  return for_each_table(
      entries, [](const Entry& e) { return prologue_parts(e); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(prologue_kernel, dim3(blocks), dim3(kThreads), kReduceBytes<kThreads>, stream, table,
               options, largest, packed, norms);
        return launched();
      });
}

int launch_momentum(const std::vector<Entry>& entries, const Prologue& options,
                    const uint32_t* largest, void* stream) {
  return for_each_table(
      entries, [](const Entry& e) { return prologue_parts(e); },
      [&](const Table& table, unsigned blocks) {
        LAUNCH(momentum_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, options, largest);
        return launched();
      });
}

int launch_count(const std::vector<Counter>& counters, NonFinite nonfinite, const uint32_t* largest,
                 unsigned long long* skipped, void* stream) {
  return for_each_counter_table(counters, [&](const CounterTable& table, unsigned blocks) {
    LAUNCH(count_kernel, dim3(blocks), dim3(kThreads), kThreads / 32 * sizeof(int64_t), stream,
           table, nonfinite, largest, skipped);
    return launched();
  });
}

}  // namespace spectral_kernels::cuda
