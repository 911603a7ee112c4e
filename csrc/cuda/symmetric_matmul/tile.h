// What the kernels for products share: tiles, parts of sums, and what becomes of a finished tile.
#pragma once

#include "../base/delivery.h"
#include "../base/kernel_table.h"
#include "product.h"

namespace spectral_kernels::cuda {

constexpr int kDepth = 32;      // of a step of mma.sync
constexpr int kMostChunks = 4;  // parts of a sum; one is written once and read once: more never pay

HOST_DEVICE int64_t over(int64_t n, int64_t by) { return (n + by - 1) / by; }
HOST_DEVICE int64_t square_line(const Entry& e) { return over(e.rows, 64) * 64; }
HOST_DEVICE int64_t steps_of(const Entry& e, Shape shape) {
  return (shape == Shape::kGram ? e.packed.line : square_line(e)) / kDepth;
}
HOST_DEVICE int64_t chunks_of(const Entry& e, Shape shape) {
  return shape == Shape::kWide   ? 1
         : shape == Shape::kGram ? e.product.chunks
                                 : e.product.square_chunks;
}
HOST_DEVICE int64_t tiles_of(const Entry& e, Shape shape, int tile) {
  const int64_t down = over(square_line(e), tile);
  return shape == Shape::kWide ? over(e.rows, tile) * over(e.packed.line, tile)
                               : down * (down + 1) / 2;
}

// Row and column of a tile. Those of a lower triangle go row by row; those of A X column by column,
// so that blocks at work share a column of X.
struct Cell {
  int64_t row, column;
};

DEVICE Cell cell_of(const Entry& e, Shape shape, int tile, int64_t t) {
  if (shape == Shape::kWide) {
    const int64_t down = over(e.rows, tile);
    return {t % down, t / down};
  }
  int64_t row = int64_t((sqrtf(8.f * float(t) + 1) - 1) / 2);  // a guess
  while (row * (row + 1) / 2 > t) row--;
  while ((row + 1) * (row + 2) / 2 <= t) row++;
  return {row, t - row * (row + 1) / 2};
}

DEVICE uint32_t packed_pair(float u, float v, bool f16) {
  return f16 ? pack_f16(u, v) : pack_bf16(u, v);
}
DEVICE float2 pair_of(uint32_t w, bool f16) { return f16 ? unpack_f16(w) : unpack_bf16(w); }

DEVICE float2 load_pair(const uint16_t* at, int64_t plane, const Format& format) {
  float2 f = pair_of(fresh(reinterpret_cast<const uint32_t*>(at)), format.f16);
  if (format.planes == 2) {
    const float2 low = pair_of(fresh(reinterpret_cast<const uint32_t*>(at + plane)), format.f16);
    f.x += low.x;
    f.y += low.y;
  }
  return f;
}

DEVICE void store_pair(uint16_t* at, int64_t plane, const Format& format, float u, float v) {
  const uint32_t high = packed_pair(u, v, format.f16);
  *reinterpret_cast<uint32_t*>(at) = high;
  if (format.planes == 1) return;
  const float2 kept = pair_of(high, format.f16);
  *reinterpret_cast<uint32_t*>(at + plane) = packed_pair(u - kept.x, v - kept.y, format.f16);
}

// A result in shared memory, permuted so that neither rows nor columns share banks.
template <int kTile>
DEVICE float& staged(char* shared, int row, int column) {
  return reinterpret_cast<float*>(
      shared)[row * kTile + (column ^ ((row & 7) << 2 | (row >> 3 & 3)))];
}

// What a block works on.
struct Unit {
  Place at;
  int64_t matrix;
  int tile, chunk, chunks;
  Cell cell;
  bool diagonal;
};

DEVICE Unit unit_of(const Place& at, int64_t number, int part, int parts, Shape shape, int tile) {
  Unit u;
  u.at = at;
  u.matrix = at.entry->first + at.matrix;
  u.tile = int(number);
  u.chunk = part;
  u.chunks = parts;
  u.cell = cell_of(*at.entry, shape, tile, number);
  u.diagonal = shape != Shape::kWide && u.cell.row == u.cell.column;
  return u;
}

DEVICE Unit unit_of(const Table& table, const int64_t* first_block, int64_t item, Shape shape,
                    int tile) {
  const Place at = place(table, first_block, item, [&](const Entry& e) {
    return tiles_of(e, shape, tile) * chunks_of(e, shape);
  });
  const int chunks = int(chunks_of(*at.entry, shape));
  return unit_of(at, at.part / chunks, int(at.part % chunks), chunks, shape, tile);
}

DEVICE Unit unit_of(const Table& table, int64_t item, Shape shape, int tile) {
  return unit_of(table, table.first_block, item, shape, tile);
}

// Whether there is nothing to do: what is looked at is nowhere near the end of its range. This does
// not change while the kernel runs.
DEVICE bool idle(const Unit& u, const Product& p) {
  return p.d == nullptr && p.update.look && !doubtful(p.update, *u.at.entry, u.matrix);
}

// Where matrices begin in their workspaces.
struct Offsets {
  int64_t square, square_plane, of_square, x_plane, of_x;
};

DEVICE Offsets offsets_of(const Unit& u, int x_planes) {
  const Entry& e = *u.at.entry;
  Offsets o;
  o.square = square_line(e);
  o.square_plane = e.rows * o.square;
  o.x_plane = e.rows * e.packed.line;
  o.of_square = e.square + u.at.matrix * o.square_plane * 2;
  o.of_x = e.packed.plane + u.at.matrix * o.x_plane * x_planes;
  return o;
}

// Adds the parts of a sum; false for a block that was not the last to arrive, which leaves its part
// behind. `tid` counts the threads that take part; `turn` is a word of shared memory.
template <int kTile, int kThreads>
DEVICE bool add_parts(const Unit& unit, const Product& p, const ProductBuffers& buffers,
                      char* shared, int* turn, int tid) {
  constexpr int kSize = kTile * kTile;
  const Entry& e = *unit.at.entry;
  const int chunks = unit.chunks, chunk = unit.chunk;
  const int64_t counter = e.product.tile + unit.at.matrix * tiles_of(e, p.shape, kTile) + unit.tile;
  float* parts = buffers.parts + counter * kMostChunks * kSize;
  // The last block need not write its own part, if it knows that it is the last. One thread's
  // fence is one for all that stands before its barrier, and for all that comes behind the next.
  if (tid == 0) {
    *turn = int(fresh(buffers.arrived + counter));
    __threadfence();
  }
  BARRIER(kThreads);
  if (*turn + 1 != int(chunks)) {
    for (int i = tid; i < kSize; i += kThreads)
      parts[chunk * kSize + i] = staged<kTile>(shared, i / kTile, i % kTile);
    BARRIER(kThreads);
    if (tid == 0) {
      __threadfence();
      *turn = int(atomicAdd(buffers.arrived + counter, 1u));
      __threadfence();
    }
    BARRIER(kThreads);
    if (*turn + 1 != int(chunks)) return false;
  }
  if (tid == 0) buffers.arrived[counter] = 0;
  for (int i = tid; i < kSize; i += kThreads) {
    float& own = staged<kTile>(shared, i / kTile, i % kTile);
    float all = 0;
    for (int c = 0; c < chunks; c++) all += c == chunk ? own : fresh(parts + c * kSize + i);
    own = all;
  }
  BARRIER(kThreads);
  return true;
}

// alpha times a staged element. Both mirror images of an element are one number: a tile on the
// diagonal shows its lower half.
template <int kTile>
DEVICE float scaled_element(char* shared, float alpha, bool diagonal, int row, int column) {
  return rounded_product(alpha, diagonal && row < column ? staged<kTile>(shared, column, row)
                                                         : staged<kTile>(shared, row, column));
}

// D in its workspace.
template <int kTile, int kThreads, bool kWide>
DEVICE void store_in_workspace(const Unit& unit, const Product& p, const Offsets& o, float alpha,
                               float beta, char* shared, int tid) {
  const Entry& e = *unit.at.entry;
  const int64_t row0 = unit.cell.row * kTile, column0 = unit.cell.column * kTile;
  const bool diagonal = unit.diagonal;
  const int64_t line = kWide ? e.packed.line : o.square;
  const int64_t c_plane = kWide ? o.x_plane : o.square_plane;
  const int64_t offset = kWide ? o.of_x : o.of_square;
  if (!kWide && p.c != nullptr) {
    // C is read once, from the triangle that is stored in every format, and both images of D are
    // written from what is staged then.
    for (int i = tid; i < kTile * kTile / 2; i += kThreads) {
      const int fast = i % (kTile / 2) * 2, slow = i / (kTile / 2);
      const int64_t row = row0 + slow, column = column0 + fast;
      if (row >= e.rows || column > row) continue;
      const float2 old = load_pair(p.c + offset + row * line + column, c_plane, p.c_format);
      float &u = staged<kTile>(shared, slow, fast), &v = staged<kTile>(shared, slow, fast + 1);
      u = fmaf(beta, old.x, rounded_product(alpha, u));
      v = fmaf(beta, old.y, rounded_product(alpha, v));
    }
    BARRIER(kThreads);
    alpha = 1;
  }
  const auto result = [&](int row, int column) {
    return scaled_element<kTile>(shared, alpha, diagonal, row, column);
  };
  const auto put = [&](int64_t row, int64_t column, float u, float v) {
    if (row >= e.rows || column >= line) return;
    const int64_t place_of_pair = offset + row * line + column;
    if (kWide && p.c != nullptr) {
      const float2 old = load_pair(p.c + place_of_pair, c_plane, p.c_format);
      u = fmaf(beta, old.x, u);
      v = fmaf(beta, old.y, v);
    }
    u += row == column ? p.gamma : 0.f;
    v += row == column + 1 ? p.gamma : 0.f;
    store_pair(p.d + place_of_pair, c_plane, p.d_format, u, v);
  };
  for (int i = tid; i < kTile * kTile / 2; i += kThreads) {
    const int fast = i % (kTile / 2) * 2, slow = i / (kTile / 2);
    put(row0 + slow, column0 + fast, result(slow, fast), result(slow, fast + 1));
    if (!kWide && !diagonal && !p.d_format.lower)
      put(column0 + slow, row0 + fast, result(fast, slow), result(fast + 1, slow));
  }
}

// D in the target of its entry, which may be a parameter, or be added to.
template <int kTile, int kThreads, bool kWide>
DEVICE void store_in_target(const Unit& unit, const Product& p, const ProductBuffers& buffers,
                            const Offsets& o, float alpha, char* shared, int tid) {
  const Place& at = unit.at;
  const Entry& e = *at.entry;
  const int64_t matrix = e.first + at.matrix;
  const int64_t row0 = unit.cell.row * kTile, column0 = unit.cell.column * kTile;
  const bool diagonal = unit.diagonal;
  const int64_t line = kWide ? e.packed.line : o.square;
  const int64_t c_plane = kWide ? o.x_plane : o.square_plane;
  const Update& update = p.update;
  // A product before this one may have raised it in the same launch.
  const uint32_t largest = fresh(buffers.largest + matrix);
  bool usable = finite(largest);
  int shift = p.unshift * pack_shift(largest, p.x_f16);
  for (const uint32_t* other : p.others)
    if (other != nullptr) {
      usable = usable && finite(other[matrix]);
      shift += pack_shift(other[matrix], true);
    }
  const bool look = kWide && update.look;
  // While others look, `largest` may change between two threads.
  if (!look && !usable && update.nonfinite == NonFinite::kSkip) return;
  if (kWide && p.c != nullptr) {
    for (int i = tid; i < kTile * kTile / 2; i += kThreads) {
      const int fast = i % (kTile / 2) * 2, slow = i / (kTile / 2);
      if (row0 + slow >= e.rows || column0 + fast >= line) continue;
      const float2 old =
          load_pair(p.c + o.of_x + (row0 + slow) * line + column0 + fast, c_plane, p.c_format);
      float &u = staged<kTile>(shared, slow, fast), &v = staged<kTile>(shared, slow, fast + 1);
      u = fmaf(p.beta / p.alpha, old.x, u);
      v = fmaf(p.beta / p.alpha, old.y, v);
    }
    BARRIER(kThreads);
  }
  // Only A X moves a parameter: the kernels for symmetric products have no registers to spare.
  const Move move = kWide ? move_of(update, e) : Move{};
  uint32_t lost = 0;
  PowerOfTwo unshifted(-shift);
  const int64_t columns = kWide ? e.columns : e.rows;
  if (!kWide && update.add) {
    // An old matrix may be the target itself: both images are written from what is read here.
    for (int i = tid; i < kTile * kTile; i += kThreads) {
      const int row = i / kTile, column = i % kTile;
      if (row0 + row >= e.rows || column0 + column >= e.rows || (diagonal && row < column))
        continue;
      float& own = staged<kTile>(shared, row, column);
      // The scale comes between both steps: with either end it may overflow.
      own = alpha * own * unshifted.first * e.scale * unshifted.second;
      if (e.keep != 0)
        own = fmaf(e.keep,
                   read(e.momentum, at.matrix * e.momentum.batch + (row0 + row) * e.momentum.row +
                                        (column0 + column) * e.momentum.column),
                   own);
    }
    BARRIER(kThreads);
    alpha = 1;
    unshifted = PowerOfTwo(0);
  }
  const auto result = [&](int row, int column) {
    return scaled_element<kTile>(shared, alpha, diagonal, row, column);
  };
  const auto deliver = [&](int64_t row, int64_t column, float value) {
    if (row >= e.rows || column >= columns) return;
    const int64_t to = at.matrix * e.target.batch + row * e.target.row + column * e.target.column;
    value = unshifted(value);
    if (!usable) value = float_of(0x7fc00000u);
    if (kWide && update.in_place) value = move(read(e.target, to), value);
    if (look)
      lost = larger(lost, lost_bits(e.target.type, value));
    else
      write(e.target, to, value);
  };
  const bool transposed = e.target.row < e.target.column;
  for (int i = tid; i < kTile * kTile; i += kThreads) {
    const int fast = i % kTile, slow = i / kTile;
    const int row = transposed ? fast : slow, column = transposed ? slow : fast;
    deliver(row0 + row, column0 + column, result(row, column));
    if (!kWide && !diagonal) deliver(column0 + slow, row0 + fast, result(fast, slow));
  }
  if (lost != 0) atomicMax(buffers.largest + matrix, lost);
}

// Adds the parts of a sum and writes D, from a tile of sums that is staged and behind a barrier.
// Multiplications with an addition are written out, so that all kernels round alike.
template <int kTile, int kThreads, bool kWide>
DEVICE void finish_tile(const Unit& unit, const Product& p, const ProductBuffers& buffers,
                        char* shared, int* turn, int tid) {
  if (unit.chunks > 1 && !add_parts<kTile, kThreads>(unit, p, buffers, shared, turn, tid)) return;
  const Offsets o = offsets_of(unit, p.format.planes);
  float factor = p.factor != nullptr ? p.factor[unit.matrix] : 1.f;
  if (p.power == 2) factor *= factor;
  const float alpha = p.alpha * factor, beta = p.beta * factor;
  if (p.d != nullptr)
    store_in_workspace<kTile, kThreads, kWide>(unit, p, o, alpha, beta, shared, tid);
  else
    store_in_target<kTile, kThreads, kWide>(unit, p, buffers, o, alpha, shared, tid);
}

}  // namespace spectral_kernels::cuda
