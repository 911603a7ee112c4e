// What becomes of the sums of a tile, for all kernels that make them: parts are added and C is, in
// registers; the result is turned in shared memory, and leaves in words of 16 bytes. Types and
// layouts are asked for once a tile. Multiplications with an addition are written out, so that all
// kernels round alike.
#pragma once

#include "../base/delivery.h"
#include "../base/words.h"
#include "tile.h"

namespace spectral_kernels::cuda {

// Adds the parts of a sum, of which a thread has the same kCount numbers in each; false for a block
// that was not the last to arrive, which leaves its part behind. `tid` counts the kThreads that
// take part, as group number `group`; `turn` is a word of shared memory.
template <int kThreads, int kCount>
DEVICE bool add_parts(float* parts, uint32_t* counter, int chunk, int chunks, float* sum, int* turn,
                      int tid, int group) {
  constexpr int kSize = kThreads * kCount;
  static_assert(kCount % 4 == 0);
  const auto words_of = [&](int c) { return parts + int64_t(c) * kSize + tid * 4; };
  const auto leave = [&] {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      store_words(words_of(chunk) + i * kThreads,
                  make_uint4(bits_of(sum[i]), bits_of(sum[i + 1]), bits_of(sum[i + 2]),
                             bits_of(sum[i + 3])));
  };
  // The last block need not write its own part, if it knows that it is the last. One thread's
  // fence is one for all that stands before its barrier, and for all that comes behind the next.
  if (tid == 0) {
    *turn = int(load_relaxed(counter));
    __threadfence();
  }
  BARRIER(group, kThreads);
  const bool known = *turn + 1 == chunks;
  if (!known) {
    leave();
    BARRIER(group, kThreads);
    if (tid == 0) {
      __threadfence();
      *turn = int(atomicAdd(counter, 1u));
      __threadfence();
    }
    BARRIER(group, kThreads);
    if (*turn + 1 != chunks) return false;
  }
  if (tid == 0) *counter = 0;
  // Parts are added in their order. Where the own one comes later than as the second number of a
  // sum, it goes through memory: there are no registers for two.
  const bool first = chunk == 0 || chunks == 2;
  const auto part_of = [&](int c, int i) {
    return fresh(reinterpret_cast<const float4*>(words_of(c) + i * kThreads));
  };
  if (!first) {
    if (known) leave();
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = part_of(0, i);
      sum[i] = v.x;
      sum[i + 1] = v.y;
      sum[i + 2] = v.z;
      sum[i + 3] = v.w;
    }
  }
  // Some at a time: with all loads in flight the sums would not fit into registers.
  constexpr int kAtOnce = kCount < 32 ? kCount : 32;
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kAtOnce)
#pragma unroll 1
    for (int c = first ? 0 : 1; c < chunks; c++) {
      if (first && c == chunk) continue;
#pragma unroll
      for (int i = begin; i < begin + kAtOnce; i += 4) {
        const float4 v = part_of(c, i);
        sum[i] += v.x;
        sum[i + 1] += v.y;
        sum[i + 2] += v.z;
        sum[i + 3] += v.w;
      }
    }
  return true;
}

// Sums as mma.sync and wgmma leave them: a thread has two columns of rows that are 8 apart, of
// kI x kJ blocks of 16 x 8.
template <int kI, int kJ>
using Sums = float[kI][kJ][4];

// Calls go(i, j, h, row, column) for every pair, counted from the thread's first.
template <int kI, int kJ, class Go>
DEVICE void for_each_pair(Go go) {
#pragma unroll
  for (int i = 0; i < kI; i++)
#pragma unroll
    for (int j = 0; j < kJ; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) go(i, j, h, i * 16 + h * 8, j * 8);
}

// What a sum is multiplied by, and C.
struct Factors {
  float alpha, beta;
};

DEVICE Factors factors_of(const Unit& unit, const Product& p) {
  float factor = p.factor != nullptr ? p.factor[unit.matrix] : 1.f;
  if (p.power == 2) factor *= factor;
  return {p.alpha * factor, p.beta * factor};
}

// alpha sum + beta C, with the words of C as `old(i, j, h)`.
template <int kI, int kJ, class Old>
DEVICE void add_c(Sums<kI, kJ>& sum, Factors by, Old old) {
  for_each_pair<kI, kJ>([&](int i, int j, int h, int, int) {
    const float2 c = old(i, j, h);
    float &u = sum[i][j][2 * h], &v = sum[i][j][2 * h + 1];
    u = fmaf(by.beta, c.x, rounded_product(by.alpha, u));
    v = fmaf(by.beta, c.y, rounded_product(by.alpha, v));
  });
}
template <int kI, int kJ>
DEVICE void scale(Sums<kI, kJ>& sum, float alpha) {
  for_each_pair<kI, kJ>([&](int i, int j, int h, int, int) {
    sum[i][j][2 * h] = rounded_product(alpha, sum[i][j][2 * h]);
    sum[i][j][2 * h + 1] = rounded_product(alpha, sum[i][j][2 * h + 1]);
  });
}

// The thread's first element is `below` rows below the diagonal.
template <int kI, int kJ>
DEVICE void add_to_diagonal(Sums<kI, kJ>& sum, int below, float gamma) {
  for_each_pair<kI, kJ>([&](int i, int j, int h, int row, int column) {
    if (below + row == column) sum[i][j][2 * h] += gamma;
    if (below + row == column + 1) sum[i][j][2 * h + 1] += gamma;
  });
}

// An element of a square in shared memory whose words of 16 bytes are permuted: pairs of eight
// rows, eight words of a row, and 16 columns of two rows that are 8 apart fall into different
// banks.
template <int kSide>
DEVICE float* staged(char* shared, int row, int column) {
  const int word = column >> 2;
  const int place = word ^ (word >> 3 & 1) ^ (row & 3) << 1 ^ (row >> 3 & 1) << 2;
  return reinterpret_cast<float*>(shared) + row * kSide + place * 4 + (column & 3);
}

// Sums to shared memory, from the thread's first element on.
template <int kSide, int kI, int kJ>
DEVICE void stage(Sums<kI, kJ>& sum, char* shared, int row, int column) {
  for_each_pair<kI, kJ>([&](int i, int j, int h, int down, int right) {
    *reinterpret_cast<float2*>(staged<kSide>(shared, row + down, column + right)) =
        make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
  });
}

// Staged rows of a result, and where they belong.
template <int kRows_, int kColumns_, int kThreads_>
struct Panel {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kThreads = kThreads_;
  char* shared;
  int64_t row, column;
  int tid, group;
  bool diagonal, mirrored;  // mirrored: its mirror image is written as well
};

// Both mirror images of an element are one number: a square on the diagonal shows its lower half.
template <class Square>
DEVICE void mirror_lower(const Square& panel) {
  constexpr int kSide = Square::kColumns;
#pragma unroll 4
  for (int i = panel.tid; i < kSide * kSide; i += Square::kThreads) {
    const int row = i / kSide, column = i % kSide;
    if (row < column)
      *staged<kSide>(panel.shared, row, column) = *staged<kSide>(panel.shared, column, row);
  }
}

template <bool kInRow, int kUnrolled, class Square, class Go>
DEVICE void for_each_eight(const Square& panel, Go go) {
  constexpr int kRows = Square::kRows, kSide = Square::kColumns;
#pragma unroll kUnrolled
  for (int i = panel.tid; i < kRows * kSide / 8; i += Square::kThreads) {
    // Two neighbours in a column make 32 bytes of memory.
    const int row = kInRow ? i / (kSide / 8) : i / 32 / (kSide / 16) * 16 + i / 16 % 2 * 8;
    const int column = kInRow ? i % (kSide / 8) * 8 : i / 32 % (kSide / 16) * 16 + i % 16;
    float x[8];
    if (kInRow) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float4 v =
            *reinterpret_cast<const float4*>(staged<kSide>(panel.shared, row, column + 4 * k));
        x[4 * k] = v.x;
        x[4 * k + 1] = v.y;
        x[4 * k + 2] = v.z;
        x[4 * k + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = *staged<kSide>(panel.shared, row + k, column);
    }
    go(row, column, x);
  }
}
// Calls go(row, column, x) for eight staged elements in a row, or in a column, from there on.
template <int kUnrolled = 1, class Square, class Go>
DEVICE void for_each_eight(const Square& panel, bool in_row, Go go) {
  if (in_row)
    for_each_eight<true, kUnrolled>(panel, go);
  else
    for_each_eight<false, kUnrolled>(panel, go);
}

// Eight numbers in one plane, or as high and low halves in two.
template <int kPlanes, bool kF16>
DEVICE void store_packed(uint16_t* to, int64_t plane, const float (&x)[8]) {
  uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    high[i] = packed_pair(x[2 * i], x[2 * i + 1], kF16);
    const float2 kept = pair_of(high[i], kF16);
    low[i] = packed_pair(x[2 * i] - kept.x, x[2 * i + 1] - kept.y, kF16);
  }
  store_words(to, make_uint4(high[0], high[1], high[2], high[3]));
  if (kPlanes == 2) store_words(to + plane, make_uint4(low[0], low[1], low[2], low[3]));
}

// What is left of a matrix, as far as a panel can reach.
DEVICE int left_of(int64_t elements) { return elements < 1 << 16 ? int(elements) : 1 << 16; }

// D in its workspace, whose rows are whole groups of eight.
template <int kPlanes, bool kF16, class Square>
DEVICE void store_in_workspace(const Square& panel, uint16_t* d, int64_t line, int64_t plane,
                               int64_t rows) {
  for (int image = 0; image < 1 + panel.mirrored; image++) {
    const int64_t row0 = image == 0 ? panel.row : panel.column,
                  column0 = image == 0 ? panel.column : panel.row;
    const int rows_left = left_of(rows - row0), columns_left = left_of(line - column0);
    uint16_t* first = d + row0 * line + column0;
    for_each_eight(panel, image == 0, [&](int down, int right, const float (&x)[8]) {
      const int row = image == 0 ? down : right, column = image == 0 ? right : down;
      if (row < rows_left && column < columns_left)
        store_packed<kPlanes, kF16>(first + row * line + column, plane, x);
    });
  }
}

template <bool kWide, class Square>
DEVICE void store_in_workspace(const Unit& unit, const Product& p, int x_planes,
                               const Square& panel) {
  const Entry& e = *unit.at.entry;
  const Offsets o = offsets_of(unit, x_planes);
  const int64_t line = kWide ? e.packed.line : o.square;
  const int64_t plane = kWide ? o.x_plane : o.square_plane;
  uint16_t* d = p.d + (kWide ? o.of_x : o.of_square);
  if (p.d_format.planes == 2)
    store_in_workspace<2, true>(panel, d, line, plane, e.rows);
  else if (p.d_format.f16)
    store_in_workspace<1, true>(panel, d, line, plane, e.rows);
  else
    store_in_workspace<1, false>(panel, d, line, plane, e.rows);
}

// How a matrix goes to the target of its entry, which may be a parameter.
struct Delivery {
  Matrices target;
  int64_t matrix, rows, columns;
  bool kept = false, usable = true, look = false, moves = false;
  Move move;
  PowerOfTwo unshifted{0};
};

template <bool kWide>
DEVICE Delivery delivery_of(const Unit& unit, const Product& p, const ProductBuffers& buffers) {
  const Entry& e = *unit.at.entry;
  Delivery d{e.target, unit.at.matrix, e.rows, kWide ? e.columns : e.rows};
  // A product before this one may have raised it in the same launch.
  const uint32_t largest = fresh(buffers.largest + unit.matrix);
  d.usable = finite(largest);
  int shift = p.unshift * pack_shift(largest, p.x_f16);
  for (const uint32_t* other : p.others)
    if (other != nullptr) {
      d.usable = d.usable && finite(other[unit.matrix]);
      shift += pack_shift(other[unit.matrix], true);
    }
  d.unshifted = PowerOfTwo(-shift);
  // While others look, `largest` may change between two threads.
  d.look = kWide && p.update.look;
  d.kept = !d.look && !d.usable && p.update.nonfinite == NonFinite::kSkip;
  // Only A X moves a parameter: the kernels for symmetric products have no registers to spare.
  d.moves = kWide && p.update.in_place;
  if (kWide) d.move = move_of(p.update, e);
  return d;
}

// keep momentum + scale x in place of a staged x, of the lower triangle. The old matrix may be the
// target itself: both images are written from what is read here.
template <class Square>
DEVICE void add_old(const Unit& unit, const PowerOfTwo& unshifted, const Square& panel) {
  constexpr int kSide = Square::kColumns;
  // Copies: what is written may be anything, for all that the compiler knows.
  const Matrices m = unit.at.entry->momentum;
  const int64_t base = unit.at.matrix * m.batch, rows = unit.at.entry->rows;
  const float keep = unit.at.entry->keep, scale = unit.at.entry->scale;
  // The scale comes between both steps: with either end it may overflow.
  const auto scaled = [&](float x) { return x * unshifted.first * scale * unshifted.second; };
  const bool in_row = m.row >= m.column, reads = keep != 0;
  const int64_t fast_end = rows / 8 * 8;
  const bool words = reads && !panel.diagonal && m.type == Type::kF32 &&
                     in_words(m, in_row ? m.row : m.column, in_row ? m.column : m.row);
  if (words)
    for_each_eight<2>(panel, in_row, [&](int down, int right, const float (&x)[8]) {
      const int64_t row = panel.row + down, column = panel.column + right;
      if (row >= rows || column >= rows || (in_row ? column : row) >= fast_end) return;
      float old[8];
      load_eight<Type::kF32>(m.data, base + row * m.row + column * m.column, old);
#pragma unroll
      for (int k = 0; k < 8; k++)
        *staged<kSide>(panel.shared, down + (in_row ? 0 : k), right + (in_row ? k : 0)) =
            fmaf(keep, old[k], scaled(x[k]));
    });
  if (words && fast_end == rows) return;
#pragma unroll 1
  for (int i = panel.tid; i < kSide * kSide; i += Square::kThreads) {
    const int down = i / kSide, right = i % kSide;
    const int64_t row = panel.row + down, column = panel.column + right;
    if (row >= rows || column >= rows || (panel.diagonal && row < column) ||
        (words && (in_row ? column : row) < fast_end))
      continue;
    float own = scaled(*staged<kSide>(panel.shared, down, right));
    if (reads) own = fmaf(keep, read(m, base + row * m.row + column * m.column), own);
    *staged<kSide>(panel.shared, down, right) = own;
    if (panel.diagonal) *staged<kSide>(panel.shared, right, down) = own;
  }
}

// D in its target, of whatever type and strides. Returns kInfinityBits where a look finds what
// would be lost.
template <bool kMoves, class Square>
DEVICE uint32_t store_in_target(const Delivery& how, const Square& panel) {
  constexpr int kRows = Square::kRows, kColumns = Square::kColumns;
  const Matrices t = how.target;
  const auto value_of = [&](float x) {
    return how.usable ? how.unshifted(x) : float_of(0x7fc00000u);
  };
  const bool in_row = t.row >= t.column, moves = kMoves && how.moves, look = kMoves && how.look;
  const int64_t slow = in_row ? t.row : t.column, fast = in_row ? t.column : t.row;
  const bool words = in_words(t, slow, fast);
  uint32_t lost = 0;
  for (int image = 0; image < 1 + (!kMoves && panel.mirrored); image++) {
    // Lines of the target's memory stand in rows or in columns of what is staged.
    const bool across = (image == 0) == in_row;
    const int64_t row0 = image == 0 ? panel.row : panel.column,
                  column0 = image == 0 ? panel.column : panel.row;
    const int rows_left = left_of(how.rows - row0), columns_left = left_of(how.columns - column0);
    const int lines = in_row ? rows_left : columns_left, length = in_row ? columns_left : rows_left;
    const int64_t first = how.matrix * t.batch + row0 * t.row + column0 * t.column;
    const int whole = words ? length / 8 * 8 : 0;  // the rest is no whole word, or not aligned
    if (words)
      with_type(t.type, [&](auto type) {
        constexpr Type kType = decltype(type)::value;
        for_each_eight<kMoves ? 2 : 1>(panel, across, [&](int down, int right, float (&x)[8]) {
          const int line = across ? down : right, at_line = across ? right : down;
          if (line >= lines || at_line >= whole) return;
          const int64_t to = first + line * slow + at_line;
          float old[8] = {};
          if (moves) load_eight<kType>(t.data, to, old);
#pragma unroll
          for (int k = 0; k < 8; k++) {
            x[k] = value_of(x[k]);
            if (moves) x[k] = how.move(old[k], x[k]);
            if (look) lost = larger(lost, lost_bits(kType, x[k]));
          }
          if (!look) store_eight<kType>(t.data, to, x);
        });
      });
    if (whole >= length) continue;
#pragma unroll 1
    for (int i = panel.tid; i < kRows * kColumns; i += Square::kThreads) {
      const int down = across ? i / kColumns : i % kRows, right = across ? i % kColumns : i / kRows;
      const int line = across ? down : right, at_line = across ? right : down;
      if (line >= lines || at_line >= length || at_line < whole) continue;
      const int64_t to = first + line * slow + at_line * fast;
      float value = value_of(*staged<kColumns>(panel.shared, down, right));
      if (moves) value = how.move(read(t, to), value);
      if (look)
        lost = larger(lost, lost_bits(t.type, value));
      else
        write(t, to, value);
    }
  }
  return lost;
}

// Brings a panel of a target to L2, or of the old matrix that one is added to, while its product
// is still computed.
template <int kRows, int kColumns, int kThreads>
DEVICE void prefetch_panel(const Matrices& m, int64_t matrix, int64_t row0, int64_t column0,
                           int64_t rows, int64_t columns, int tid) {
  constexpr int kLine = 128;
  const bool in_row = m.row >= m.column;
  const int64_t slow = in_row ? m.row : m.column, slow0 = in_row ? row0 : column0,
                fast0 = in_row ? column0 : row0, slow_end = in_row ? rows : columns,
                fast_end = in_row ? columns : rows;
  if ((in_row ? m.column : m.row) != 1) return;
  const int bytes = bytes_of(m.type), each = kLine / bytes;
  const int slow_side = in_row ? kRows : kColumns, fast_side = in_row ? kColumns : kRows;
  const int lines = slow_side * ((fast_side + each - 1) / each);
  // A panel may have more lines than threads.
  for (int n = tid; n < lines; n += kThreads) {
    const int line = n % slow_side, i = n / slow_side * each;
    if (slow0 + line >= slow_end || fast0 + i >= fast_end) continue;
    prefetch_line(static_cast<const char*>(m.data) +
                  (matrix * m.batch + (slow0 + line) * slow + fast0 + i) * bytes);
  }
}

template <int kRows, int kColumns, int kThreads, bool kWide>
DEVICE void prefetch_target(const Unit& unit, const Product& p, int64_t row0, int64_t column0,
                            int tid) {
  const Entry& e = *unit.at.entry;
  if (p.d != nullptr) return;
  if (kWide && p.update.in_place)
    prefetch_panel<kRows, kColumns, kThreads>(e.target, unit.at.matrix, row0, column0, e.rows,
                                              e.columns, tid);
  if (!kWide && p.update.add && e.keep != 0)
    prefetch_panel<kRows, kColumns, kThreads>(e.momentum, unit.at.matrix, row0, column0, e.rows,
                                              e.rows, tid);
}

}  // namespace spectral_kernels::cuda
