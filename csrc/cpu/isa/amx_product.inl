// Products on tiles, of BF16 panels and of F32 panels as sums of bf16 parts.
//
// A panel's rows of pairs are what an instruction reads as its right operand; as the left operand
// it wants pairs along the rows, the transposed words. So a job first brings its panels, a stretch
// of k at a time, into the form that the instructions read, and then multiplies each with each.
//
// An fp32 number is x = x1 + x2 + x3 with bf16 parts, each the nearest to what the ones before it
// left, which is exact: 8 bits of the 24 each. Of the nine products of parts the six down to 2^-16
// of the largest are added up; what is left out is at most 2^-24 of |x y|, the rounding of one fp32
// multiplication, and 2^-27 of it in the root mean square. The sum is an fp32 number, in a fixed
// order.
//
// The instruction takes subnormal parts and products for 0. A column whose largest element in a
// stretch is so small (or so large) that this, or the rounding of a part to infinity, could be seen
// is scaled by a power of two, and the result back. A stretch with an element that is not finite is
// multiplied without tiles.

#include "amx_tiles.inl"

using Pairs = Simd<float>;
static_assert(Pairs::kPanel == 2 * kTileRows, "a block is 2 x 2 tiles");

constexpr int kStepRows = 2 * kTileRows;    // rows of k that an instruction multiplies
constexpr int kStepWords = 2 * kTileWords;  // of one part of a panel in such a step
constexpr int kParts = 3;                   // of an fp32 number

// Rows of k at a time: the parts of one left panel and those of a right one stay in L1.
constexpr int64_t kPairStretch = 192, kSplitStretch = 96;
static_assert(kPairStretch % kStepRows == 0 && kSplitStretch % kStepRows == 0);

// The largest jobs: the result and the operands stay in an L2 of 2 MiB.
constexpr int64_t kPairEdge = 12, kSplitEdge = 12;

// Words of a panel as the instructions read it, in one stretch of k: for every step, part and half
// of the columns, a tile.
constexpr int64_t kPairWords = kPairStretch / kStepRows * kStepWords;
constexpr int64_t kSplitWords = kSplitStretch / kStepRows * kParts * kStepWords;

// ---------------------------------------------------------------- operands

// The 16 x 16 words of a tile transposed. Rows from `rows` on are taken for 0.
SK_INLINE void transpose_words(const uint32_t* in, int64_t stride, int rows, uint32_t* out) {
  Vector<float> row[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
    row[i] = i < rows ? load(reinterpret_cast<const float*>(in + i * stride)) : Vector<float>{};
  Transpose<float>::stage<kTileRows / 2>(row);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) store(reinterpret_cast<float*>(out + i * kTileRows), row[i]);
}

// Rows [0, k) of a panel of pairs as left operands, zeros beyond k.
static void left_pairs(const uint32_t* panel, int64_t k, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel;
  for (int64_t pairs = (k + 1) / 2; pairs > 0; pairs -= kTileRows, panel += kTileRows * P)
    for (int half = 0; half < 2; half++, tiles += kTileWords) {
      const uint32_t* from = panel + half * kTileRows;
      if (pairs >= kTileRows)
        transpose_words(from, P, kTileRows, tiles);
      else
        transpose_words(from, P, int(pairs), tiles);
    }
}

// Of the columns of a panel in a stretch of k.
struct Columns {
  bool finite = true, scaled = false;
  alignas(64) float exponent[Pairs::kPanel];  // they were multiplied by 2^-exponent
};

typedef int32_t Flags __attribute__((vector_size(SK_VECTOR_BYTES)));  // of comparisons

#if defined(SK_EMULATE_TILES)
SK_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> exponent) {
  for (int l = 0; l < Pairs::kLanes; l++) x[l] = __builtin_ldexpf(x[l], int(exponent[l]));
  return x;
}
SK_INLINE bool any(Flags flags) {
  int set = 0;
  for (int l = 0; l < Pairs::kLanes; l++) set |= flags[l];
  return set != 0;
}
#else
SK_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> exponent) {
  return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)exponent);
}
SK_INLINE bool any(Flags flags) {
  return _mm512_test_epi32_mask((__m512i)flags, (__m512i)flags) != 0;
}
#endif

// The exponents between which the largest element of a column needs no scaling: products of 2^-50
// leave 26 bits above the smallest normal number, those of 2^60 are far from overflow however many
// are added.
constexpr uint32_t kInfinityBits = 0x7f800000u, kSmallestBits = uint32_t(127 - 50) << 23,
                   kLargestBits = uint32_t(127 + 60) << 23;

SK_INLINE Words magnitude(const float* p) { return (Words)load(p) & 0x7fffffffu; }
SK_INLINE Words larger(Words a, Words b) { return a > b ? a : b; }

// From the bit patterns of the columns' largest elements.
static void judge_columns(const uint32_t* largest, Columns& columns) {
  columns.finite = true;
  columns.scaled = false;
  for (int j = 0; j < Pairs::kPanel; j++) {
    const uint32_t bits = largest[j];
    columns.finite = columns.finite && bits < kInfinityBits;
    columns.scaled = columns.scaled || (bits > 0 && bits < kSmallestBits) || bits > kLargestBits;
    columns.exponent[j] = 0;
    if (bits > 0 && bits < kInfinityBits)
      columns.exponent[j] = float(__builtin_ilogbf(float_of(bits)));
  }
}

// The columns of a panel, rows [0, k).
static void look_at_columns(const float* panel, int64_t k, Columns& columns) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  Words most[2] = {};
  for (int64_t i = 0; i < k; i++, panel += P) {
    most[0] = larger(most[0], magnitude(panel));
    most[1] = larger(most[1], magnitude(panel + kLanes));
  }
  columns.finite = true;
  columns.scaled = false;
  const auto unusual = [](Words bits) {
    return ((bits > 0u) & (bits < kSmallestBits)) | (bits > kLargestBits);
  };
  if (!any(unusual(most[0]) | unusual(most[1]))) return;
  alignas(64) uint32_t largest[P];
  store(reinterpret_cast<float*>(largest), (Vector<float>)most[0]);
  store(reinterpret_cast<float*>(largest + kLanes), (Vector<float>)most[1]);
  judge_columns(largest, columns);
}

// The columns as rows of the transposed matrix: `rows` of them in `steps` panels.
static void look_at_rows(const float* transposed, int64_t stride, int rows, int64_t steps,
                         Columns& columns) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  const auto row_maxima = [&](int r) {
    Words most = {};
    for (int64_t s = 0; s < steps; s++) {
      const float* row = transposed + s * stride + r * P;
      most = larger(most, larger(magnitude(row), magnitude(row + kLanes)));
    }
    return most;
  };
  columns.finite = true;
  columns.scaled = false;
  bool usual = true;
  Words most = {};
  for (int r = 0; r < rows; r++) {
    const Words of_row = row_maxima(r);
    usual = usual && (any(of_row >= kSmallestBits) || !any(of_row > 0u));
    most = larger(most, of_row);
  }
  if (usual && !any(most > kLargestBits)) return;
  uint32_t largest[P] = {};
  for (int r = 0; r < rows; r++) {
    const Words of_row = row_maxima(r);
    for (int l = 0; l < kLanes; l++) largest[r] = of_row[l] > largest[r] ? of_row[l] : largest[r];
  }
  judge_columns(largest, columns);
}

// Pairs of the nearest bf16 numbers of two vectors, which are left with the rest.
SK_INLINE Words take_part(Vector<float>& low, Vector<float>& high) {
  constexpr uint32_t kHalf = 0x8000u, kUpper = 0xffff0000u;
  const Words a = ((Words)low + kHalf) & kUpper, b = ((Words)high + kHalf) & kUpper;
  low -= (Vector<float>)a;
  high -= (Vector<float>)b;
  return b | (a >> 16);
}

// The words of two vectors to the same place in the tiles of their parts.
SK_INLINE void store_parts(Vector<float> low, Vector<float> high, uint32_t* to) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; part++)
    store(reinterpret_cast<float*>(to + part * kStepWords), (Vector<float>)take_part(low, high));
}

// Rows [0, k) of a panel of fp32 numbers as right operands, zeros beyond k. Row i of a step is
// paired with row i + 16: which rows are pairs is free as long as both operands agree, and so
// neither image needs a permutation.
template <bool kScaled>
static void right_parts(const float* panel, int64_t k, const Columns& columns, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  for (; k > 0; k -= kStepRows, panel += kStepRows * P, tiles += kParts * kStepWords)
    for (int half = 0; half < 2; half++) {
      Vector<float> exponent = {};
      if constexpr (kScaled) exponent = -load(columns.exponent + half * kLanes);
      const auto words = [&](int i, Vector<float> low, Vector<float> high) {
        if constexpr (kScaled) {
          low = times_power_of_two(low, exponent);
          high = times_power_of_two(high, exponent);
        }
        store_parts(low, high, tiles + half * kTileWords + i * kTileRows);
      };
      const float* from = panel + half * kLanes;
      if (k >= kStepRows) {
        for (int i = 0; i < kTileRows; i++)
          words(i, load(from + i * P), load(from + (i + kTileRows) * P));
      } else {
        for (int i = 0; i < kTileRows; i++)
          words(i, i < k ? load(from + i * P) : Vector<float>{},
                i + kTileRows < k ? load(from + (i + kTileRows) * P) : Vector<float>{});
      }
    }
}

// The left operands of `rows` rows of the transposed matrix in `steps` panels, zeros beyond.
template <bool kScaled>
static void left_rows(const float* transposed, int64_t stride, int rows, int64_t steps,
                      const Columns& columns, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  for (int64_t s = 0; s < steps; s++, transposed += stride, tiles += kParts * kStepWords) {
    for (int r = 0; r < rows; r++) {
      Vector<float> low = load(transposed + r * P), high = load(transposed + r * P + kLanes);
      if constexpr (kScaled) {
        const Vector<float> exponent = Vector<float>{} - columns.exponent[r];
        low = times_power_of_two(low, exponent);
        high = times_power_of_two(high, exponent);
      }
      store_parts(low, high, tiles + r * kTileRows);
    }
    for (int part = 0; part < kParts && rows < P; part++)
      __builtin_memset(tiles + part * kStepWords + rows * kTileRows, 0,
                       size_t(P - rows) * kTileRows * 4);
  }
}

// Right operands of `k` rows as left ones; `to` may be `from`.
static void left_parts(const uint32_t* from, int64_t k, uint32_t* to) {
  const int64_t tiles = ceil_div(k, int64_t(kStepRows)) * kParts * 2;
  for (int64_t t = 0; t < tiles; t++)
    transpose_words(from + t * kTileWords, kTileRows, kTileRows, to + t * kTileWords);
}

// The parts of one panel of a product's right operand, rows `k`.
static void split_right(const Panels& b, int64_t bj, Range k, Columns& columns, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel;
  const float* panel = static_cast<const float*>(b.data) + bj * b.stride + k.begin * P;
  const int64_t count = k.end - k.begin;
  look_at_columns(panel, count, columns);
  if (!columns.finite) return;
  if (columns.scaled)
    right_parts<true>(panel, count, columns, tiles);
  else
    right_parts<false>(panel, count, columns, tiles);
}

// Of the left operand: from Aᵀ where the caller has it, else transposed.
static void split_left(const Product& p, int64_t bi, Range k, Columns& columns, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel;
  if (!p.a_t) {
    split_right(p.a, bi, k, columns, tiles);
    if (columns.finite) left_parts(tiles, k.end - k.begin, tiles);
    return;
  }
  const int rows = int(p.a.cols - bi * P < P ? p.a.cols - bi * P : P);
  const int64_t steps = ceil_div(k.end - k.begin, int64_t(kStepRows));
  const float* transposed =
      static_cast<const float*>(p.a_t.data) + k.begin / kStepRows * p.a_t.stride + bi * P * P;
  look_at_rows(transposed, p.a_t.stride, rows, steps, columns);
  if (!columns.finite) return;
  if (columns.scaled)
    left_rows<true>(transposed, p.a_t.stride, rows, steps, columns, tiles);
  else
    left_rows<false>(transposed, p.a_t.stride, rows, steps, columns, tiles);
}

// ---------------------------------------------------------------- blocks

// Which of the four tiles of a block are computed.
struct Needed {
  bool upper_right, lower_left, lower_right;
  bool all() const { return upper_right && lower_left && lower_right; }
};

enum Register : int { kC00, kC01, kC10, kC11, kA0, kA1, kB0, kB1 };

template <bool kAll>
SK_INLINE void load_left(Needed needed, const uint32_t* left) {
  tile_load<kA0>(left, kTileRowBytes);
  if (kAll || needed.lower_left) tile_load<kA1>(left + kTileWords, kTileRowBytes);
}

// `stride` in bytes; the second half of the columns `words` further on.
template <bool kAll>
SK_INLINE void load_right(Needed needed, const uint32_t* right, int64_t stride, int words) {
  tile_load<kB0>(right, stride);
  if (kAll || needed.upper_right || needed.lower_right) tile_load<kB1>(right + words, stride);
}

template <bool kAll>
SK_INLINE void multiply_tiles(Needed needed) {
  tile_multiply_add<kC00, kA0, kB0>();
  if (kAll || needed.lower_left) tile_multiply_add<kC10, kA1, kB0>();
  if (kAll || needed.upper_right) tile_multiply_add<kC01, kA0, kB1>();
  if (kAll || needed.lower_right) tile_multiply_add<kC11, kA1, kB1>();
}

// Rows [0, k) of a left operand times the panel of pairs `right`.
template <bool kAll>
SK_INLINE void multiply_pairs(Needed needed, int64_t k, const uint32_t* left,
                              const uint32_t* right) {
  constexpr int P = Pairs::kPanel;
  const auto step = [&](const uint32_t* from) {
    load_right<kAll>(needed, from, P * 4, kTileRows);
    load_left<kAll>(needed, left);
    multiply_tiles<kAll>(needed);
  };
  for (; k >= kStepRows; k -= kStepRows, left += kStepWords, right += kTileRows * P) step(right);
  if (k > 0) {  // what follows the last pairs is not zero, and may not be ours
    alignas(64) uint32_t rest[kTileRows * P] = {};
    __builtin_memcpy(rest, right, size_t((k + 1) / 2) * P * 4);
    step(rest);
  }
}

// The six products of parts, small ones first.
template <bool kAll>
SK_INLINE void multiply_parts(Needed needed, int64_t k, const uint32_t* left,
                              const uint32_t* right) {
  const auto left_part = [&](int part) { load_left<kAll>(needed, left + part * kStepWords); };
  const auto right_part = [&](int part) {
    load_right<kAll>(needed, right + part * kStepWords, kTileRowBytes, kTileWords);
  };
  for (; k > 0; k -= kStepRows, left += kParts * kStepWords, right += kParts * kStepWords) {
    left_part(2);
    right_part(0);
    multiply_tiles<kAll>(needed);
    left_part(1);
    multiply_tiles<kAll>(needed);
    right_part(1);
    multiply_tiles<kAll>(needed);
    left_part(0);
    multiply_tiles<kAll>(needed);
    right_part(2);
    multiply_tiles<kAll>(needed);
    right_part(0);
    multiply_tiles<kAll>(needed);
  }
}

// c = or += the sums in a tile register, times 2^(row + column).
template <int tile>
SK_INLINE void put_tile(bool add, const float* row, const float* column, float* c) {
  constexpr int P = Pairs::kPanel;
  if (!add && row == nullptr) return tile_store<tile>(c, P * 4);
  alignas(64) float sums[kTileWords];
  tile_store<tile>(sums, kTileRowBytes);
  for (int i = 0; i < kTileRows; i++) {
    Vector<float> sum = load(sums + i * kTileRows);
    if (row != nullptr) sum = times_power_of_two(sum, row[i] + load(column));
    store(c + i * P, add ? load(c + i * P) + sum : sum);
  }
}

// Exponents of the rows and columns of a block, null where there are none.
struct Scales {
  const float *rows = nullptr, *columns = nullptr;
};

SK_INLINE void put_tiles(Needed needed, bool add, Scales scales, float* c) {
  constexpr int P = Pairs::kPanel, kHalf = kTileRows;
  const float *row = scales.rows, *column = scales.columns;
  const float *next_row = row ? row + kHalf : nullptr,
              *next_column = row ? column + kHalf : nullptr;
  put_tile<kC00>(add, row, column, c);
  if (needed.upper_right) put_tile<kC01>(add, row, next_column, c + kHalf);
  if (needed.lower_left) put_tile<kC10>(add, next_row, column, c + kHalf * P);
  if (needed.lower_right) put_tile<kC11>(add, next_row, next_column, c + kHalf * P + kHalf);
}

SK_INLINE void zero_tiles() {
  tile_zero<kC00>();
  tile_zero<kC01>();
  tile_zero<kC10>();
  tile_zero<kC11>();
}

// ---------------------------------------------------------------- jobs

// The scratch memory of a job: first the result where it has to wait for further stretches.
template <int64_t kLeftWords, int64_t kRightWords>
struct Scratch {
  static constexpr int64_t kBlock = Pairs::kPanel * Pairs::kPanel;
  float* result;
  uint32_t *left, *right;

  Scratch(void* memory, int64_t rows, int64_t cols)
      : result(static_cast<float*>(memory)),
        left(reinterpret_cast<uint32_t*>(result + rows * cols * kBlock)),
        right(left + rows * kLeftWords) {}

  static size_t bytes(int64_t edge) {
    return size_t(edge * edge * kBlock + edge * (kLeftWords + kRightWords)) * 4;
  }
};
using PairScratch = Scratch<kPairWords, 0>;
using SplitScratch = Scratch<kSplitWords, kSplitWords>;

// Equal stretches of k of whole steps. They depend on k alone, so every element is summed in the
// same order whatever the jobs and threads.
struct Stretches {
  int64_t count, rows;
  Stretches(int64_t k, int64_t longest)
      : count(k > 0 ? ceil_div(k, longest) : 1),
        rows(ceil_div(ceil_div(k, count), int64_t(kStepRows)) * kStepRows) {}
};

// The blocks of a job, the loop over stretches outside: prepare(range of k) once a stretch, and
// multiply(needed, block row, block column, rows of k that can be non-zero, c, add) for every
// block.
template <bool kSpareUpper, class Scratch, class Prepare, class Multiply>
SK_INLINE void blocks_of_job(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                             const Scratch& scratch, int64_t longest, const Prepare& prepare,
                             const Multiply& multiply) {
  constexpr int P = Pairs::kPanel;
  const int64_t m = p.a.cols, n = p.b.cols, k_rows = p.a.rows;
  const Stretches stretches(k_rows, longest);
  for (int64_t s = 0; s < stretches.count; s++) {
    const int64_t k0 = s * stretches.rows,
                  k1 = k0 + stretches.rows < k_rows ? k0 + stretches.rows : k_rows;
    const bool first = s == 0, last = s == stretches.count - 1;
    prepare(k0, k1);
    for (int64_t bi = i0; bi < i1; bi++) {
      const int rows = int(m - bi * P < P ? m - bi * P : P);
      const Range of_a = nonzero_rows<false>(p.a_shape, bi * P, P, k0, k1);
      const int64_t past = p.symmetric && bi + 1 < j1 ? bi + 1 : j1;
      for (int64_t bj = j0; bj < past; bj++) {
        const int cols = int(n - bj * P < P ? n - bj * P : P);
        const bool lower = p.symmetric && bi == bj;
        // With one stretch the block never leaves L1.
        float* c = scratch.result +
                   (stretches.count == 1 ? 0 : ((bi - i0) * (j1 - j0) + (bj - j0)) * P * P);
        const Range k = nonzero_rows<false>(p.b_shape, bj * P, P, of_a.begin, of_a.end);
        const bool tall = rows > kTileRows, wide = cols > kTileRows;
        // The fourth tile of a block on the diagonal costs less than to leave it out, but for
        // parts.
        const bool spare = lower && kSpareUpper;
        const Needed needed = {wide && !spare, tall, tall && wide};
        if (first && (!needed.all() || k.end <= k.begin)) clear_block(c);
        if (k.end > k.begin) multiply(needed, bi, bj, k, c, !first);
        if (last) finish_block<float>(p, bi, bj, rows, cols, c);
      }
    }
  }
}

static void pair_product_blocks(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                                void* memory) {
  constexpr int P = Pairs::kPanel;
  const PairScratch scratch(memory, i1 - i0, j1 - j0);
  const uint32_t *a = static_cast<const uint32_t*>(p.a.data),
                 *b = static_cast<const uint32_t*>(p.b.data);
  int64_t begin = 0;  // of the stretch
  tiles_configure();
  blocks_of_job<false>(
      p, i0, i1, j0, j1, scratch, kPairStretch,
      [&](int64_t k0, int64_t k1) {
        begin = k0;
        for (int64_t bi = i0; bi < i1; bi++) {
          const Range k = nonzero_rows<false>(p.a_shape, bi * P, P, k0, k1);
          if (k.end > k.begin)
            left_pairs(
                a + bi * p.a.stride + k.begin / 2 * P, k.end - k.begin,
                scratch.left + (bi - i0) * kPairWords + (k.begin - k0) / kStepRows * kStepWords);
        }
      },
      [&](Needed needed, int64_t bi, int64_t bj, Range k, float* c, bool add) {
        const uint32_t* left =
            scratch.left + (bi - i0) * kPairWords + (k.begin - begin) / kStepRows * kStepWords;
        const uint32_t* right = b + bj * p.b.stride + k.begin / 2 * P;
        zero_tiles();
        if (needed.all())
          multiply_pairs<true>(needed, k.end - k.begin, left, right);
        else
          multiply_pairs<false>(needed, k.end - k.begin, left, right);
        put_tiles(needed, add, Scales{}, c);
      });
  tiles_release();
}

// Whether splitting costs less than it saves: not for small products, whose panels meet few others.
// Cycles of a step of k, measured on Emerald Rapids; with a margin, since the loads of tiles take
// up to three times as long where somebody uses the other hardware thread of the core.
static bool splitting_pays(const Product& p) {
  constexpr double kFmaRow = 36, kBlock = 480, kPanel = 660, kMargin = 1.5;
  const int64_t P = Pairs::kPanel, m = ceil_div(p.a.cols, P), n = ceil_div(p.b.cols, P);
  const double blocks = p.symmetric ? 0.5 * double(m) * double(m + 1) : double(m) * double(n);
  const int64_t steps = ceil_div(p.a.rows, int64_t(kStepRows));
  const double split = double(steps) * (blocks * kBlock + double(m + n) * kPanel);
  return kMargin * split < blocks * double(p.a.rows) * kFmaRow;
}

static void split_product_blocks(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                                 void* memory) {
  if (!splitting_pays(p)) return product_blocks<float, float>(p, i0, i1, j0, j1, memory);
  constexpr int P = Pairs::kPanel;
  const SplitScratch scratch(memory, i1 - i0, j1 - j0);
  const float *a = static_cast<const float*>(p.a.data), *b = static_cast<const float*>(p.b.data);
  // A job on the diagonal of a symmetric product of one matrix has the same panels twice.
  const bool shared = !p.a_t && p.symmetric && i0 == j0 && i1 == j1 && a == b &&
                      p.a.stride == p.b.stride && p.a_shape == p.b_shape;
  Columns of_a[kSplitEdge], of_b[kSplitEdge];
  int64_t begin = 0;  // of the stretch
  const auto offset = [&](const Range& k) {
    return (k.begin - begin) / kStepRows * kParts * kStepWords;
  };
  tiles_configure();
  blocks_of_job<true>(
      p, i0, i1, j0, j1, scratch, kSplitStretch,
      [&](int64_t k0, int64_t k1) {
        begin = k0;
        for (int64_t bj = j0; bj < j1; bj++) {
          const Range k = nonzero_rows<false>(p.b_shape, bj * P, P, k0, k1);
          if (k.end <= k.begin) continue;
          split_right(p.b, bj, k, of_b[bj - j0],
                      scratch.right + (bj - j0) * kSplitWords + offset(k));
        }
        for (int64_t bi = i0; bi < i1; bi++) {
          const Range k = nonzero_rows<false>(p.a_shape, bi * P, P, k0, k1);
          if (k.end <= k.begin) continue;
          uint32_t* left = scratch.left + (bi - i0) * kSplitWords + offset(k);
          Columns& columns = of_a[bi - i0];
          if (!shared) {
            split_left(p, bi, k, columns, left);
            continue;
          }
          columns = of_b[bi - i0];
          if (columns.finite)
            left_parts(scratch.right + (bi - i0) * kSplitWords + offset(k), k.end - k.begin, left);
        }
      },
      [&](Needed needed, int64_t bi, int64_t bj, Range k, float* c, bool add) {
        const Columns &rows = of_a[bi - i0], &columns = of_b[bj - j0];
        const int64_t count = k.end - k.begin;
        if (!rows.finite || !columns.finite) {
          const int high = int(p.a.cols - bi * P < P ? p.a.cols - bi * P : P);
          const int wide = int(p.b.cols - bj * P < P ? p.b.cols - bj * P : P);
          const bool lower = p.symmetric && bi == bj;
          const float *of_row = a + bi * p.a.stride + k.begin * P,
                      *of_column = b + bj * p.b.stride + k.begin * P;
          if (!add) clear_block(c);
          block_product<float, float, true>(high, wide, lower, count, of_row, of_column, c);
          return;
        }
        const uint32_t *left = scratch.left + (bi - i0) * kSplitWords + offset(k),
                       *right = scratch.right + (bj - j0) * kSplitWords + offset(k);
        zero_tiles();
        if (needed.all())
          multiply_parts<true>(needed, count, left, right);
        else
          multiply_parts<false>(needed, count, left, right);
        alignas(64) static const float kNone[P] = {};
        Scales scales;
        if (rows.scaled || columns.scaled) {
          scales.rows = rows.scaled ? rows.exponent : kNone;
          scales.columns = columns.scaled ? columns.exponent : kNone;
        }
        put_tiles(needed, add, scales, c);
      });
  tiles_release();
}

// Instructions on registers alone: what the ceiling is measured with.
static double tile_multiply_adds(int64_t rounds) {
  tiles_configure();
  for (int64_t i = 0; i < rounds; i++) {
    tile_multiply_add<kC00, kA0, kB0>();
    tile_multiply_add<kC01, kA0, kB1>();
    tile_multiply_add<kC10, kA1, kB0>();
    tile_multiply_add<kC11, kA1, kB1>();
  }
  tiles_release();
  return 4.0 * double(rounds) * 2 * kTileRows * kTileRows * 2 * kTileRows;
}
