// Stream-K: the steps of all tiles of one matrix stand in a line that is cut into stretches of one
// length, so that as many blocks are equally long at work. Where a cut falls inside of a tile, its
// sum is made in parts. Nothing here depends on what else is in a list.
#pragma once

#include "../base/ptx.h"

namespace spectral_kernels::cuda {

struct Cut {
  int64_t tiles, steps;  // of a matrix, of a tile
  int64_t length;        // of a stretch, in steps
  HOST_DEVICE int64_t total() const { return tiles * steps; }
  HOST_DEVICE int64_t stretches() const { return (total() + length - 1) / length; }
  HOST_DEVICE bool divides() const { return length % steps != 0; }
};

// A tile's share of a stretch: steps begin .. end-1, which are number `part` of so many parts.
struct Piece {
  int64_t tile;
  int begin, end, part, parts;
};

// Calls go(piece) for the tiles of a stretch in their order.
template <class Go>
HOST_DEVICE void for_each_piece(const Cut& cut, int64_t stretch, Go go) {
  const int64_t stop = (stretch + 1) * cut.length;
  const int64_t end = stop < cut.total() ? stop : cut.total();
  for (int64_t at = stretch * cut.length; at < end;) {
    const int64_t tile = at / cut.steps, first = tile * cut.steps, last = first + cut.steps;
    const int64_t next = last < end ? last : end, of_first = first / cut.length;
    go(Piece{tile, int(at - first), int(next - first), int(stretch - of_first),
             int((last - 1) / cut.length - of_first) + 1});
    at = next;
  }
}

// The length that finishes one matrix first on so many multiprocessors, where a step takes
// `step_clocks` and both ends of a divided sum together `part_clocks`. No sum is cut into more than
// `most_parts` parts, 2 or more.
inline Cut stream_k(int64_t tiles, int64_t steps, int multiprocessors, double step_clocks,
                    double part_clocks, int most_parts) {
  Cut best{tiles, steps, steps};
  const auto clocks = [&](const Cut& cut) {
    const int64_t waves = (cut.stretches() + multiprocessors - 1) / multiprocessors;
    return double(waves) * (double(cut.length) * step_clocks + (cut.divides() ? part_clocks : 0));
  };
  // steps - 1 begin in at most (steps - 1) / length + 2 stretches.
  const int64_t shortest = (steps + most_parts - 2) / (most_parts - 1);
  for (int waves = 1; waves <= 4; waves++) {
    const int64_t blocks = int64_t(waves) * multiprocessors;
    Cut cut{tiles, steps, (best.total() + blocks - 1) / blocks};
    if (cut.length < shortest) cut.length = shortest;
    if (clocks(cut) < clocks(best)) best = cut;
  }
  return best;
}

}  // namespace spectral_kernels::cuda
