// Products on tiles, of BF16 panels and of F32 panels as sums of bf16 parts.
//
// A panel's rows of pairs are what an instruction reads as its right operand; as the left operand
// it wants pairs along the rows, the transposed words. So a job brings its panels, a stretch of k
// at a time, into the form that the instructions read, and then multiplies each with each.

#include "amx_operands.inl"

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

// The sums of a block that wait to be added to those of the stretches before: this is done between
// the instructions of the next block, which leave time for it.
struct Waiting {
  static constexpr int kVectors = Pairs::kPanel * Pairs::kPanel / Pairs::kLanes;
  int done = kVectors;
  float* c = nullptr;
  alignas(64) float sums[Pairs::kPanel * Pairs::kPanel];

  void add(int vectors) {
    if (done == kVectors) return;
    const float* from = sums + done * Pairs::kLanes;
    float* to = c + done * Pairs::kLanes;
    for (int i = 0; i < vectors; i++, from += Pairs::kLanes, to += Pairs::kLanes)
      store(to, load(to) + load(from));
    done += vectors;
  }
  // Where the sums go that are to be added to `to`.
  float* later(float* to) {
    finish();
    c = to;
    done = 0;
    return sums;
  }
  void finish() {
    while (done < kVectors) add(1);
  }
};

template <bool kAll, class Between>
SK_INLINE void multiply_tiles(Needed needed, const Between& between) {
  tile_multiply_add<kC00, kA0, kB0>();
  if (kAll || needed.lower_left) tile_multiply_add<kC10, kA1, kB0>();
  between();
  if (kAll || needed.upper_right) tile_multiply_add<kC01, kA0, kB1>();
  if (kAll || needed.lower_right) tile_multiply_add<kC11, kA1, kB1>();
}

// Rows [0, k) of a left operand times the panel of pairs `right`, as it is packed or with kTiles in
// tiles.
template <bool kAll, bool kTiles>
SK_INLINE void multiply_pairs(Needed needed, int64_t k, const uint32_t* left, const uint32_t* right,
                              Waiting& waiting) {
  constexpr int P = Pairs::kPanel;
  const auto step = [&](const uint32_t* from) {
    if constexpr (kTiles)
      load_right<kAll>(needed, from, kTileRowBytes, kTileWords);
    else
      load_right<kAll>(needed, from, P * 4, kTileRows);
    load_left<kAll>(needed, left);
    multiply_tiles<kAll>(needed, [&] { waiting.add(kPairVectors); });
  };
  for (; k >= kStepRows; k -= kStepRows, left += kStepWords, right += kStepWords) step(right);
  if (k <= 0) return;
  if constexpr (kTiles) return step(right);
  // What follows the last pairs is not zero, and may not be ours.
  alignas(64) uint32_t rest[kTileRows * P] = {};
  __builtin_memcpy(rest, right, size_t((k + 1) / 2) * P * 4);
  step(rest);
}

// The six products of parts, small ones first.
template <bool kAll>
SK_INLINE void multiply_parts(Needed needed, int64_t k, const uint32_t* left, const uint32_t* right,
                              Waiting& waiting, Splitter& splitter) {
  const auto left_part = [&](int part) { load_left<kAll>(needed, left + part * kStepWords); };
  const auto right_part = [&](int part) {
    load_right<kAll>(needed, right + part * kStepWords, kTileRowBytes, kTileWords);
  };
  const auto multiply = [&] {
    multiply_tiles<kAll>(needed, [&] {
      waiting.add(kSplitVectors);
      splitter.advance();
    });
  };
  for (; k > 0; k -= kStepRows, left += kParts * kStepWords, right += kParts * kStepWords) {
    left_part(2);
    right_part(0);
    multiply();
    left_part(1);
    multiply();
    right_part(1);
    multiply();
    left_part(0);
    multiply();
    right_part(2);
    multiply();
    right_part(0);
    multiply();
  }
}

// Exponents of the rows and columns of a block, null where there are none.
struct Scales {
  const float *rows = nullptr, *columns = nullptr;
};

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

SK_INLINE void put_tiles(Needed needed, bool add, Scales scales, float* c, Waiting& waiting) {
  constexpr int P = Pairs::kPanel, kHalf = kTileRows;
  const float *row = scales.rows, *column = scales.columns;
  waiting.finish();
  if (add && row == nullptr && needed.all()) {
    c = waiting.later(c);
    add = false;
  }
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
using PairScratch = Scratch<kPairWords, kPairWords>;
using SplitScratch = Scratch<2 * kSplitWords, 2 * kSplitWords>;  // this stretch and the next

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
                             const Scratch& scratch, int64_t longest, Waiting& waiting,
                             const Prepare& prepare, const Multiply& multiply) {
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
        if (!last) continue;
        waiting.finish();
        finish_block<float>(p, bi, bj, rows, cols, c);
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
  const bool of_rows = bool(p.rows), shared = i0 == j0 && i1 == j1;
  int64_t begin = 0;  // of the stretch
  Waiting waiting;
  const auto rows_as_operands = [&](int64_t k0, int64_t k1) {
    for (int64_t bi = i0; bi < i1; bi++) {
      uint32_t* left = scratch.left + (bi - i0) * kPairWords;
      left_pairs_of_rows(p.rows, bi * P, {k0, k1}, left);
      if (shared) right_pairs(left, k1 - k0, scratch.right + (bi - i0) * kPairWords);
    }
    for (int64_t bj = j0; bj < j1 && !shared; bj++) {
      uint32_t* right = scratch.right + (bj - j0) * kPairWords;
      left_pairs_of_rows(p.rows, bj * P, {k0, k1}, right);
      right_pairs(right, k1 - k0, right);
    }
  };
  tiles_configure();
  blocks_of_job<false>(
      p, i0, i1, j0, j1, scratch, kPairStretch, waiting,
      [&](int64_t k0, int64_t k1) {
        begin = k0;
        if (of_rows) return rows_as_operands(k0, k1);
        for (int64_t bi = i0; bi < i1; bi++) {
          const Range k = nonzero_rows<false>(p.a_shape, bi * P, P, k0, k1);
          if (k.end > k.begin)
            left_pairs(
                a + bi * p.a.stride + k.begin / 2 * P, k.end - k.begin,
                scratch.left + (bi - i0) * kPairWords + (k.begin - k0) / kStepRows * kStepWords);
        }
      },
      [&](Needed needed, int64_t bi, int64_t bj, Range k, float* c, bool add) {
        const int64_t at = (k.begin - begin) / kStepRows * kStepWords, count = k.end - k.begin;
        const uint32_t *left = scratch.left + (bi - i0) * kPairWords + at,
                       *right = of_rows ? scratch.right + (bj - j0) * kPairWords + at
                                        : b + bj * p.b.stride + k.begin / 2 * P;
        zero_tiles();
        if (of_rows && needed.all())
          multiply_pairs<true, true>(needed, count, left, right, waiting);
        else if (of_rows)
          multiply_pairs<false, true>(needed, count, left, right, waiting);
        else if (needed.all())
          multiply_pairs<true, false>(needed, count, left, right, waiting);
        else
          multiply_pairs<false, false>(needed, count, left, right, waiting);
        put_tiles(needed, add, Scales{}, c, waiting);
      });
  tiles_release();
}

// Whether splitting costs less than it saves: not for small products, whose panels meet few others.
// Cycles of a step of k, from single products of 64 to 256 rows on an Intel Xeon with AMX; the
// margin from batches on two threads, which gain nothing at 96 rows and a sixth at 256.
static bool splitting_pays(const Product& p) {
  constexpr double kFmaRow = 36, kBlock = 480, kPanel = 780, kMargin = 1.3;
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
  Splitter::Parts parts[2];
  for (int64_t i = 0; i < 2; i++) {
    parts[i].left = scratch.left + i * (i1 - i0) * kSplitWords;
    parts[i].right = scratch.right + i * (j1 - j0) * kSplitWords;
  }
  Splitter splitter(p, i0, i1, j0, j1);
  Waiting waiting;
  const Splitter::Parts* now = parts + 1;
  int64_t begin = 0;  // of the stretch
  const auto offset = [&](const Range& k) {
    return (k.begin - begin) / kStepRows * kParts * kStepWords;
  };
  tiles_configure();
  blocks_of_job<true>(
      p, i0, i1, j0, j1, scratch, kSplitStretch, waiting,
      [&](int64_t k0, int64_t k1) {
        if (k0 == 0) splitter.start(parts[0], k0, k1);
        splitter.finish();
        begin = k0;
        now = now == parts ? parts + 1 : parts;
        const int64_t past = k1 + (k1 - k0) < p.a.rows ? k1 + (k1 - k0) : p.a.rows;
        if (past > k1) splitter.start(now == parts ? parts[1] : parts[0], k1, past);
      },
      [&](Needed needed, int64_t bi, int64_t bj, Range k, float* c, bool add) {
        const Columns &rows = now->of_a[bi - i0], &columns = now->of_b[bj - j0];
        const int64_t count = k.end - k.begin;
        if (!rows.finite || !columns.finite) {
          const int high = int(p.a.cols - bi * P < P ? p.a.cols - bi * P : P);
          const int wide = int(p.b.cols - bj * P < P ? p.b.cols - bj * P : P);
          const bool lower = p.symmetric && bi == bj;
          waiting.finish();
          if (!add) clear_block(c);
          const float *of_row = a + bi * p.a.stride + k.begin * P,
                      *of_column = b + bj * p.b.stride + k.begin * P;
          block_product<float, float, true>(high, wide, lower, count, of_row, of_column, c);
          return;
        }
        const uint32_t *left = now->left + (bi - i0) * kSplitWords + offset(k),
                       *right = now->right + (bj - j0) * kSplitWords + offset(k);
        alignas(64) static const float kNone[P] = {};
        Scales scales;
        if (rows.scaled || columns.scaled) {
          scales.rows = rows.scaled ? rows.exponent : kNone;
          scales.columns = columns.scaled ? columns.exponent : kNone;
        }
        zero_tiles();
        if (needed.all())
          multiply_parts<true>(needed, count, left, right, waiting, splitter);
        else
          multiply_parts<false>(needed, count, left, right, waiting, splitter);
        put_tiles(needed, add, scales, c, waiting);
      });
  tiles_release();
}

// Whether the operand of a symmetric product can be read where it is: rows of pairs.
static bool reads_rows(const Product& p) {
  return p.a.kind == Kind::kBF16 && p.rows.dtype == DType::kBF16 && p.rows.col_stride == 1;
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
