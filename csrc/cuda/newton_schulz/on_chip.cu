// The three kernels of a segment: Gram matrix, steps on chip, X <- Q X.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../base/kernel_table.h"
#include "../base/launch.h"
#include "../symmetric_matmul/epilogue.h"
#include "../symmetric_matmul/on_chip_matrix.h"
#include "on_chip.h"

namespace spectral_kernels::cuda {
namespace {

// Tiles of 16 rows: kernels exist for some numbers only.
int row_tiles(int rows) {
  for (const int tiles : {1, 2, 4, 6, 8})
    if (rows <= 16 * tiles) return tiles;
  return 0;
}

template <bool kF16>
struct Half {
  static DEVICE uint32_t pack(float a, float b) { return kF16 ? pack_f16(a, b) : pack_bf16(a, b); }
  static DEVICE float2 unpack(uint32_t w) { return kF16 ? unpack_f16(w) : unpack_bf16(w); }
  static DEVICE void mma(float* d, const uint32_t* a, const uint32_t* b) {
    if (kF16)
      mma_f16(d, a, b);
    else
      mma_bf16(d, a, b);
  }
};

template <int kNB>
constexpr int64_t kPartFloats = OnChip<kNB>::kMatrix / 4;
template <int kNB>
constexpr int64_t kQWords = int64_t(kNB) * kNB * 512;  // A fragments of 16 x 16 tiles, high and low

HOST_DEVICE int64_t chunks_of(const Entry& e) {
  return (e.packed.line + kChunkColumns - 1) / kChunkColumns;
}

// What products read of a matrix: rows of `columns` numbers, 8 of which are one aligned word.
struct Lines {
  const uint16_t* data;
  int64_t row, plane, columns;
};

DEVICE Lines lines_of(const Entry& e, int64_t matrix, int planes, const uint16_t* packed) {
  if (e.packed.direct)
    return {static_cast<const uint16_t*>(e.source.data) + matrix * e.source.batch, e.source.row, 0,
            e.columns};
  const int64_t size = e.rows * e.packed.line;
  return {packed + e.packed.plane + matrix * size * planes, e.packed.line, size, e.packed.line};
}

// Eight numbers to shared memory; those that are scaled are there at the next barrier.
template <bool kF16>
DEVICE void copy_piece(char* to, const Lines& x, int plane, int64_t row, int64_t column,
                       int64_t rows, int shift) {
  const bool valid = row < rows && column < x.columns;
  const uint16_t* from = x.data + (valid ? plane * x.plane + row * x.row + column : 0);
  if (shift == 0) {
    copy_async(to, from, valid);
    return;
  }
  const PowerOfTwo scaled(shift);
  const uint4 v = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  const auto word = [&](uint32_t w) {
    const float2 f = Half<kF16>::unpack(w);
    return Half<kF16>::pack(scaled(f.x), scaled(f.y));
  };
  *reinterpret_cast<uint4*>(to) = make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
}

// Gram matrix

constexpr int kStages = 4, kStepColumns = 32, kLineBytes = kStepColumns * 2;

// Rows of 64 bytes whose four 16-byte pieces are permuted, so that the 8 rows of an ldmatrix fall
// into different banks.
DEVICE char* piece_of(char* tile, int row, int piece) {
  return tile + row * kLineBytes + ((piece ^ (row >> 1)) & 3) * 16;
}

// One block: the partial sum of X Xᵀ over one chunk of columns, in the tiles of OnChip. It also
// finds the largest |element| of what is read in place; a second launch, `scaled`, sums those
// matrices anew whose numbers turned out to need scaling.
template <int kNB, int kPlanes, bool kF16>
__global__ void __launch_bounds__(kNB * 32)
    gram_kernel(const __grid_constant__ Table table, const uint16_t* packed, uint32_t* largest,
                bool scaled, float* parts) {
  using Chip = OnChip<kNB>;
  constexpr int kRows = 16 * kNB, kPlaneBytes = kRows * kLineBytes,
                kStageBytes = kPlanes * kPlaneBytes;
  constexpr int kPromoted = 2;  // steps between additions to the sum in full precision
  DYNAMIC_SHARED(char, shared);
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return chunks_of(e); });
  const Entry& e = *at.entry;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  uint32_t* of_matrix = largest + e.first + at.matrix;
  if (scaled && (!e.packed.direct || usual(*of_matrix, kF16))) return;
  const int shift = scaled ? pack_shift(*of_matrix, kF16) : 0;
  const bool measured = e.packed.direct && !scaled;
  const Lines x = lines_of(e, at.matrix, kPlanes, packed);
  const int64_t begin = at.part * kChunkColumns;
  const int64_t end = begin + kChunkColumns < e.packed.line ? begin + kChunkColumns : e.packed.line;
  const int steps = int((end - begin) / kStepColumns);

  const auto fetch = [&](int step) {
    if (step < steps) {
      char* stage = shared + step % kStages * kStageBytes;
      for (int i = tid; i < kPlanes * kRows * 4; i += Chip::kThreads) {
        const int plane = i / (kRows * 4), row = i / 4 % kRows, piece = i % 4;
        copy_piece<kF16>(piece_of(stage + plane * kPlaneBytes, row, piece), x, plane, row,
                         begin + step * kStepColumns + piece * 8, e.rows, shift);
      }
    }
    copy_async_commit();
  };

  float total[Chip::kTiles][8] = {}, acc[Chip::kTiles][8] = {};
  uint32_t first = 0, second = 0;  // the largest of all even and of all odd columns
  for (int i = 0; i < kStages - 1; i++) fetch(i);
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    char* stage = shared + step % kStages * kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[kPlanes][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++)
        load_matrix(a[plane], piece_of(stage + plane * kPlaneBytes, warp * 16 + lane % 16,
                                       half * 2 + lane / 16));
      if (measured)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          first = larger(first, a[0][i] & 0x7fffu);
          second = larger(second, a[0][i] & 0x7fff0000u);
        }
#pragma unroll
      for (int d = 0; d < Chip::kTiles; d++) {
        if (d == Chip::kHalf && warp >= kNB / 2) continue;
        uint32_t b[kPlanes][4];
        const int row = Chip::wrap(warp + d) * 16 + lane % 8 + lane / 16 * 8;
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++)
          load_matrix(b[plane],
                      piece_of(stage + plane * kPlaneBytes, row, half * 2 + lane / 8 % 2));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (kPlanes == 2) {
            Half<kF16>::mma(acc[d] + 4 * h, a[kPlanes - 1], b[0] + 2 * h);
            Half<kF16>::mma(acc[d] + 4 * h, a[0], b[kPlanes - 1] + 2 * h);
          }
          Half<kF16>::mma(acc[d] + 4 * h, a[0], b[0] + 2 * h);
        }
      }
    }
    // Tensor cores truncate; their sums stay short where fp32 accuracy is promised.
    if (kPlanes == 2 && step % kPromoted == kPromoted - 1)
#pragma unroll
      for (int d = 0; d < Chip::kTiles; d++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          total[d][i] += acc[d][i];
          acc[d][i] = 0;
        }
  }
  copy_async_wait<0>();
  if (measured) {
    uint32_t most = larger(first, second >> 16);
    for (int mask = 16; mask; mask >>= 1) most = larger(most, __shfl_xor_sync(~0u, most, mask));
    if (lane == 0) atomicMax(of_matrix, bits_of(Half<kF16>::unpack(most).x));
  }

  float* out = parts + e.chip.part + (at.matrix * chunks_of(e) + at.part) * kPartFloats<kNB>;
#pragma unroll
  for (int d = 0; d < Chip::kTiles; d++) {
    if (d == Chip::kHalf && warp >= kNB / 2) continue;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float *t = total[d] + 4 * h, *s = acc[d] + 4 * h;
      *reinterpret_cast<float4*>(out + (((warp * Chip::kTiles + d) * 2 + h) * 32 + lane) * 4) =
          make_float4(t[0] + s[0], t[1] + s[1], t[2] + s[2], t[3] + s[3]);
    }
  }
}

// Steps

// All steps of a segment. Q goes out as A fragments, high and low halves.
template <int kNB>
__global__ void __launch_bounds__(kNB * 32, 1)
    steps_kernel(const __grid_constant__ Table table, const Segment segment, bool f16,
                 const uint32_t* largest, const float* parts, uint16_t* q, float* alpha) {
  using Chip = OnChip<kNB>;
  DYNAMIC_SHARED(char, shared);
  constexpr int kR = 0, kW = Chip::kMatrix, kQ = 2 * Chip::kMatrix;
  double* scratch = reinterpret_cast<double*>(shared + 3 * Chip::kMatrix);
  const Chip chip(shared);
  const Place at = place(table, blockIdx.x, [](const Entry&) { return int64_t(1); });
  const Entry& e = *at.entry;
  const int lane = chip.lane, warp = chip.warp;
  const int64_t chunks = chunks_of(e);
  const float* part = parts + e.chip.part + at.matrix * chunks * kPartFloats<kNB>;

  typename Chip::Accumulator acc;
  Chip::zero(acc);
  for (int64_t chunk = 0; chunk < chunks; chunk++)
#pragma unroll
    for (int d = 0; d < Chip::kTiles; d++)
      if (chip.owner(d))
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float4 v = *reinterpret_cast<const float4*>(
              part + chunk * kPartFloats<kNB> +
              (((warp * Chip::kTiles + d) * 2 + h) * 32 + lane) * 4);
          acc[d][4 * h] += v.x;
          acc[d][4 * h + 1] += v.y;
          acc[d][4 * h + 2] += v.z;
          acc[d][4 * h + 3] += v.w;
        }
  Chip::symmetrize(acc);

  float r_scale = segment.r_scale, q_scale = 1, inverse = 1;
  if (segment.first) {
    // 1 / norm in the packed scale; X = 0, from gradient and momentum that cancel, stays 0.
    const double trace = chip.trace(acc, scratch);
    double norm = sqrt(trace);
    Chip::scale(acc, trace > 0 ? float(1 / trace) : 0.f);
    if (segment.schatten8) {
      chip.store(acc, shared + kR, r_scale);
      __syncthreads();
      typename Chip::Accumulator square;
      Chip::zero(square);
      chip.product(square, kR, kR);
      const double unscale = 1 / (double(r_scale) * r_scale);
      const double sum = chip.sum_of_squares(square, scratch) * unscale * unscale;
      norm *= sqrt(sqrt(sqrt(sum)));
    }
    const int shift = shift_of(e, largest[e.first + at.matrix], f16);
    const double used = divisor_of(norm * segment.norm_factor, segment.eps, shift);
    inverse = inverse_of(used);
    Chip::scale(acc, used > 0 ? float(trace / (used * used)) : 0.f);
  } else {
    inverse = 1 / segment.before;
    Chip::scale(acc, inverse * inverse);
  }
  chip.store(acc, shared + kR, r_scale);
  __syncthreads();

  for (int t = 0; t < segment.steps; t++) {
    const OnChipStep s = segment.step[t];
    const bool last = t + 1 == segment.steps;
    if (s.c != 0) {  // acc holds R
      Chip::scale(acc, s.b / s.c * r_scale * r_scale);
      chip.product(acc, kR, kR);
      Chip::scale(acc, s.c / (r_scale * r_scale));
    } else {
      Chip::scale(acc, s.b);
    }
    if (!segment.apart) chip.add_to_diagonal(acc, s.a);
    if (t == 0) {
      q_scale = s.q_scale;
      if (last) break;
      chip.store(acc, shared + kQ, q_scale);
    }
    chip.store(acc, shared + kW, s.w_scale);
    __syncthreads();
    if (t > 0) {
      Chip::zero(acc);
      chip.product(acc, kQ, kW);
      Chip::scale(acc, 1 / (q_scale * s.w_scale));
      q_scale = s.q_scale;
      if (last) break;
      __syncthreads();
      chip.store(acc, shared + kQ, q_scale);
    }
    Chip::zero(acc);
    chip.product(acc, kR, kW);
    __syncthreads();
    chip.store(acc, shared + kR, s.t_scale / (r_scale * s.w_scale));  // T = R W over R
    __syncthreads();
    Chip::zero(acc);
    chip.product(acc, kR, kW);
    Chip::scale(acc, 1 / (s.t_scale * s.w_scale));
    r_scale = s.r_scale;
    __syncthreads();
    chip.store(acc, shared + kR, r_scale);
    __syncthreads();
  }

  const float stored = f16 ? q_scale : 1.f;
  uint16_t* out = q + e.chip.q + at.matrix * kQWords<kNB>;
  const auto put = [&](int row, int column, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
    uint16_t* tile = out + (row * kNB + column) * 512 + lane * 8;
    *reinterpret_cast<uint4*>(tile) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(tile + 256) = make_uint4(low[0], low[1], low[2], low[3]);
  };
#pragma unroll
  for (int d = 0; d < Chip::kTiles; d++) {
    if (!chip.owner(d)) continue;
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float u = acc[d][2 * i] * stored, v = acc[d][2 * i + 1] * stored;
      high[i] = f16 ? pack_f16(u, v) : pack_bf16(u, v);
      const float2 kept = f16 ? unpack_f16(high[i]) : unpack_bf16(high[i]);
      low[i] = f16 ? pack_f16(u - kept.x, v - kept.y) : pack_bf16(u - kept.x, v - kept.y);
    }
    const int other = Chip::wrap(warp + d);
    put(warp, other, high, low);
    if (d == 0) continue;
    const uint32_t mirror[2][4] = {{transpose_matrix(high[0]), transpose_matrix(high[2]),
                                    transpose_matrix(high[1]), transpose_matrix(high[3])},
                                   {transpose_matrix(low[0]), transpose_matrix(low[2]),
                                    transpose_matrix(low[1]), transpose_matrix(low[3])}};
    put(other, warp, mirror[0], mirror[1]);
  }
  if (threadIdx.x == 0) alpha[e.first + at.matrix] = inverse / stored;
}

// X <- Q X, or the update
constexpr int kTileColumns = 64, kStripTiles = 8;
template <int kPlanes>
constexpr int kApplyStages = kPlanes == 2 ? 2 : 3;
constexpr int kWarpResult = 16 * kTileColumns * 4;  // bytes of a warp's rows of a result

HOST_DEVICE int64_t strips_of(const Entry& e) {
  return (e.packed.line + kTileColumns * kStripTiles - 1) / (kTileColumns * kStripTiles);
}

// A warp's sums to its own place in shared memory, which it then reads by itself.
template <class Square>
DEVICE void stage_result(Sums<1, 8>& sum, const Square& panel, int lane) {
  __syncwarp();  // what was there has been read
  stage<Square::kColumns>(sum, panel.shared, lane / 4, lane % 4 * 2);
  __syncwarp();
}

struct Apply {
  float after = 1;  // of the X that is packed again
  float apart = 0;  // X itself is added times this, over alpha
  bool last = false;
  Update update;
};

// Blocks at a time that registers suffice for; up to 11 are spilled, and read again once a tile.
constexpr int kApplyBlocks(int tiles) {
  return tiles <= 2 ? 16 / tiles : tiles == 4 ? 3 : tiles == 6 ? 2 : 1;
}

template <int kNB, int kPlanes, bool kF16>
__global__ void __launch_bounds__(kNB * 32, kApplyBlocks(kNB))
    apply_kernel(const __grid_constant__ Table table, const Apply apply, uint32_t* largest,
                 const uint16_t* q, const float* alpha, uint16_t* packed) {
  constexpr int kRows = 16 * kNB, kLine = kTileColumns * 2, kPlaneBytes = kRows * kLine,
                kStage = kPlanes * kPlaneBytes, kStages = kApplyStages<kPlanes>;
  DYNAMIC_SHARED(char, shared);
  const Place at = place(table, blockIdx.x, [](const Entry& e) { return strips_of(e); });
  const Entry& e = *at.entry;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t size = e.rows * e.packed.line, matrix = e.first + at.matrix;
  const Lines x = lines_of(e, at.matrix, kPlanes, packed);
  const int shift = e.packed.direct ? shift_of(e, largest[matrix], kF16) : 0;
  const int64_t begin = at.part * kTileColumns * kStripTiles;
  const int64_t left = (e.packed.line - begin) / kTileColumns;
  const int tiles = int(left < kStripTiles ? left : kStripTiles);
  const bool usable = finite(largest[matrix]);
  const bool look = apply.last && apply.update.look;
  // While others look, `largest` may change between two threads.
  if (look ? !doubtful(apply.update, e, matrix)
           : apply.last && kept(largest[matrix], apply.update.nonfinite))
    return;

  const auto piece_at = [&](char* tile, int row, int piece) {
    return tile + row * kLine + ((piece ^ row) & 7) * 16;
  };
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      char* stage = shared + tile % kStages * kStage;
      for (int i = tid; i < kPlanes * kRows * 8; i += kNB * 32) {
        const int plane = i / (kRows * 8), row = i / 8 % kRows, piece = i % 8;
        copy_piece<kF16>(piece_at(stage + plane * kPlaneBytes, row, piece), x, plane, row,
                         begin + tile * kTileColumns + piece * 8, e.rows, shift);
      }
    }
    copy_async_commit();
  };

  for (int i = 0; i < kStages - 1; i++) fetch(i);
  uint32_t own[kNB][2][4];  // the warp's 16 rows of Q
#pragma unroll
  for (int k = 0; k < kNB; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = *reinterpret_cast<const uint4*>(
          q + e.chip.q + at.matrix * kQWords<kNB> + (warp * kNB + k) * 512 + half * 256 + lane * 8);
      own[k][half][0] = v.x;
      own[k][half][1] = v.y;
      own[k][half][2] = v.z;
      own[k][half][3] = v.w;
    }
  const float factor = alpha[matrix], beside = apply.apart * factor;
  Delivery how{e.target, at.matrix, e.rows, e.columns};
  how.usable = usable;
  how.look = look;
  how.moves = apply.last && apply.update.in_place;
  if (how.moves) how.move = move_of(apply.update, e);
  Panel<16, kTileColumns, 32> panel{shared + kStages * kStage + warp * kWarpResult, warp * 16, 0,
                                    lane};
  uint32_t lost = 0;

#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    panel.column = begin + tile * kTileColumns;
    if (how.moves)
      prefetch_panel<16, kTileColumns, 32>(e.target, at.matrix, panel.row, panel.column, e.rows,
                                           e.columns, lane);
    char* stage = shared + tile % kStages * kStage;
    Sums<1, 8> acc = {};
#pragma unroll
    for (int k = 0; k < kNB; k++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t b[kPlanes][4];
        const int row = k * 16 + lane % 16;
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++)
          load_matrix_transposed(b[plane],
                                 piece_at(stage + plane * kPlaneBytes, row, j * 2 + lane / 16));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* d = acc[0][2 * j + h];
          Half<kF16>::mma(d, own[k][1], b[0] + 2 * h);
          if (kPlanes == 2) Half<kF16>::mma(d, own[k][0], b[kPlanes - 1] + 2 * h);
          Half<kF16>::mma(d, own[k][0], b[0] + 2 * h);
        }
      }
    if (apply.apart != 0)
      add_c(acc, {factor, beside}, [&](int, int j, int h) {
        const char* old = piece_at(stage, warp * 16 + lane / 4 + 8 * h, j) + lane % 4 * 4;
        float2 f = Half<kF16>::unpack(*reinterpret_cast<const uint32_t*>(old));
        if (kPlanes == 2) {
          const float2 g =
              Half<kF16>::unpack(*reinterpret_cast<const uint32_t*>(old + kPlaneBytes));
          f.x += g.x;
          f.y += g.y;
        }
        return f;
      });
    else
      scale(acc, factor);
    if (!apply.last) scale(acc, apply.after);
    stage_result(acc, panel, lane);
    if (apply.last)
      lost = larger(lost, store_in_target<true>(how, panel));
    else
      store_in_workspace<kPlanes, kF16>(panel, packed + e.packed.plane + at.matrix * size * kPlanes,
                                        e.packed.line, size, e.rows);
  }
  copy_async_wait<0>();
  if (lost != 0) atomicMax(largest + matrix, lost);
}

// Launches

template <class F>
int with_tiles(int tiles, F f) {
  switch (tiles) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 6:
      return f(std::integral_constant<int, 6>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

template <int kNB, int kPlanes, bool kF16>
int launch_segments(const std::vector<Entry>& entries, const std::vector<Segment>& segments,
                    uint32_t* largest, const OnChipBuffers& buffers, const Update& update,
                    void* stream) {
  using Chip = OnChip<kNB>;
  constexpr auto gram = gram_kernel<kNB, kPlanes, kF16>;
  constexpr auto steps = steps_kernel<kNB>;
  constexpr auto apply = apply_kernel<kNB, kPlanes, kF16>;
  constexpr int kGramBytes = kStages * kPlanes * 16 * kNB * kLineBytes;
  constexpr int kStepsBytes = 3 * Chip::kMatrix + kNB * int(sizeof(double));
  constexpr int kApplyBytes =
      kApplyStages<kPlanes> * kPlanes * 16 * kNB * kTileColumns * 2 + kNB * kWarpResult;
  int error = allow_shared<gram>(kGramBytes);
  if (error == 0) error = allow_shared<steps>(kStepsBytes);
  if (error == 0) error = allow_shared<apply>(kApplyBytes);
  const dim3 block(Chip::kThreads);
  const bool may_scale = !kF16 && std::any_of(entries.begin(), entries.end(),
                                              [](const Entry& e) { return e.packed.direct; });
  const auto for_all = [&](auto parts, auto go) {
    if (error != 0) return;
    error = for_each_table(entries, parts, [&](const Table& table, unsigned blocks) {
      go(table, dim3(blocks));
      return launched();
    });
  };
  for (const Segment& segment : segments) {
    for (const bool scaled : {false, true}) {
      if (scaled && !may_scale) continue;
      for_all([](const Entry& e) { return chunks_of(e); },
              [&](const Table& table, dim3 blocks) {
                LAUNCH(gram, blocks, block, kGramBytes, stream, table, buffers.packed, largest,
                       scaled, buffers.parts);
              });
    }
    for_all([](const Entry&) { return int64_t(1); },
            [&](const Table& table, dim3 blocks) {
              LAUNCH(steps, blocks, block, kStepsBytes, stream, table, segment, kF16, largest,
                     buffers.parts, buffers.q, buffers.alpha);
            });
    Apply how;
    how.last = &segment == &segments.back();
    how.after = segment.after;
    if (segment.apart) how.apart = segment.step[0].a * (kF16 ? segment.step[0].q_scale : 1.f);
    how.update = update;
    for (const bool look : {true, false}) {
      if (look && !(how.last && update.targets != nullptr)) continue;
      how.update.look = look;
      for_all([](const Entry& e) { return strips_of(e); },
              [&](const Table& table, dim3 blocks) {
                LAUNCH(apply, blocks, block, kApplyBytes, stream, table, how, largest, buffers.q,
                       buffers.alpha, buffers.packed);
              });
    }
  }
  return error;
}

}  // namespace

int64_t onchip_bytes(int rows) {
  const int tiles = row_tiles(rows);
  return tiles == 0 ? INT64_MAX
                    : 3 * int64_t(tiles) * (tiles / 2 + 1) * 1024 + tiles * int64_t(sizeof(double));
}

bool readable_in_place(const Entry& e, bool f16, int planes, const std::vector<Segment>& segments) {
  const Matrices& m = e.source;
  return planes == 1 && segments.size() == 1 && e.momentum.data == nullptr &&
         m.type == (f16 ? Type::kF16 : Type::kBF16) && m.column == 1 && m.row % 8 == 0 &&
         m.batch % 8 == 0 && e.columns % 8 == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

OnChipSizes place_onchip(std::vector<Entry>& entries, int planes) {
  OnChipSizes sizes;
  for (Entry& e : entries) {
    const int64_t tiles = row_tiles(e.rows);
    e.packed.line = packed_line(e.columns);
    e.first = sizes.matrices;
    e.packed.plane = sizes.packed;
    e.chip.part = sizes.parts;
    e.chip.q = sizes.q;
    sizes.matrices += e.count;
    sizes.packed += e.packed.direct ? 0 : e.count * e.rows * e.packed.line * planes;
    sizes.parts += e.count * chunks_of(e) * tiles * (tiles / 2 + 1) * 256;
    sizes.q += e.count * tiles * tiles * 512;
  }
  return sizes;
}

int launch_newton_schulz(const std::vector<Entry>& entries, const std::vector<Segment>& segments,
                         bool f16, int planes, uint32_t* largest, const OnChipBuffers& buffers,
                         const Update& update, void* stream) {
  for (const int tiles : {1, 2, 4, 6, 8}) {
    std::vector<Entry> group;
    for (const Entry& e : entries)
      if (row_tiles(e.rows) == tiles) group.push_back(e);
    if (group.empty()) continue;
    const int error = with_tiles(tiles, [&](auto count) {
      constexpr int kNB = decltype(count)::value;
      if (planes == 2)
        return launch_segments<kNB, 2, true>(group, segments, largest, buffers, update, stream);
      if (f16)
        return launch_segments<kNB, 1, true>(group, segments, largest, buffers, update, stream);
      return launch_segments<kNB, 1, false>(group, segments, largest, buffers, update, stream);
    });
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace spectral_kernels::cuda
