// What the kernels for products share: tiles, and parts of sums.
#pragma once

#include "../base/delivery.h"
#include "../base/kernel_table.h"
#include "product.h"

namespace spectral_kernels::cuda {

constexpr int kDepth = 32;       // of a step of mma.sync
constexpr int kWgmmaTile = 256;  // of two blocks that multiply by wgmma
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

}  // namespace spectral_kernels::cuda
