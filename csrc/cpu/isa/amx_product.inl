// Products on tiles, of BF16 panels and of F32 panels as sums of bf16 parts.
//
// A panel's rows of pairs are what an instruction reads as its right operand; as the left operand
// it wants pairs along the rows, the transposed words. So a job brings its panels, a stretch of k
// at a time, into the form that the instructions read, and then multiplies each with each.

#include "amx_operands.inl"
#include "amx_results.inl"

// ---------------------------------------------------------------- blocks

// Which of the four tiles of a block are computed.
struct Needed {
  bool upper_right, lower_left, lower_right;
  bool all() const { return upper_right && lower_left && lower_right; }
};

enum Register : int { kC00, kC01, kC10, kC11, kA0, kA1, kB0, kB1 };

// The left operand of a panel: rows this many bytes apart, steps of k that many.
struct LeftTiles {
  const char* at;
  int64_t row = kTileRowBytes, step = kStepWords * 4;
};

template <bool kAll>
SK_INLINE void load_left(Needed needed, const char* rows, int64_t row_bytes) {
  tile_load<kA0>(rows, row_bytes);
  if (kAll || needed.lower_left) tile_load<kA1>(rows + kTileRows * row_bytes, row_bytes);
}

// `stride` in bytes; the second half of the columns `words` further on.
template <bool kAll>
SK_INLINE void load_right(Needed needed, const uint32_t* right, int64_t stride, int words) {
  tile_load<kB0>(right, stride);
  if (kAll || needed.upper_right || needed.lower_right) tile_load<kB1>(right + words, stride);
}

template <bool kAll, class Between>
SK_INLINE void multiply_tiles(Needed needed, const Between& between) {
  tile_multiply_add<kC00, kA0, kB0>();
  if (kAll || needed.lower_left) tile_multiply_add<kC10, kA1, kB0>();
  between();
  if (kAll || needed.upper_right) tile_multiply_add<kC01, kA0, kB1>();
  if (kAll || needed.lower_right) tile_multiply_add<kC11, kA1, kB1>();
}

// Brings what the next stretch reads into L2, a few lines between the instructions of this one.
class Ahead {
 public:
  void start(const uint32_t* left, int64_t left_stride, int64_t lefts, const uint32_t* right,
             int64_t right_stride, int64_t rights, int64_t words) {
    left_ = at_ = left;
    left_stride_ = left_stride;
    lefts_ = left ? lefts : 0;
    right_ = right;
    right_stride_ = right_stride;
    rights_ = right ? rights : 0;
    lines_ = words / 16;
    line_ = 0;
    next_panel();
  }
  inline __attribute__((always_inline)) void advance() {
    if (lines_ == 0) return;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; i++) __builtin_prefetch(at_ + i * 16, 0, 2);
    at_ += kLines * 16;
    if ((line_ += kLines) >= lines_) next_panel();
  }

 private:
  static constexpr int kLines = 4;
  void next_panel() {
    line_ = 0;
    if (rights_ > 0) {
      at_ = right_;
      right_ += right_stride_;
      rights_--;
    } else if (lefts_ > 0) {
      at_ = left_;
      left_ += left_stride_;
      lefts_--;
    } else {
      lines_ = 0;  // nothing is left
    }
  }
  const uint32_t *left_ = nullptr, *right_ = nullptr, *at_ = nullptr;
  int64_t left_stride_ = 0, right_stride_ = 0, lefts_ = 0, rights_ = 0, lines_ = 0, line_ = 0;
};

// Rows [0, k) of a left operand times the panel of pairs `right`, as it is packed or with kTiles in
// tiles.
template <bool kAll, bool kTiles>
SK_INLINE void multiply_pairs(Needed needed, int64_t k, LeftTiles left, const uint32_t* right,
                              Ahead& ahead) {
  constexpr int P = Pairs::kPanel;
  // Numbers of their own: the structure would go through memory, and every block wait for it.
  const char* at = left.at;
  const int64_t row = left.row, next = left.step;
  const auto step = [=, &ahead](const char* from_left, const uint32_t* from) {
    if constexpr (kTiles)
      load_right<kAll>(needed, from, kTileRowBytes, kTileWords);
    else
      load_right<kAll>(needed, from, P * 4, kTileRows);
    load_left<kAll>(needed, from_left, row);
    multiply_tiles<kAll>(needed, [&] { ahead.advance(); });
  };
  for (; k >= kStepRows; k -= kStepRows, at += next, right += kStepWords) step(at, right);
  if (k <= 0) return;
  if constexpr (kTiles) return step(at, right);
  // What follows the last pairs is not zero, and may not be ours.
  alignas(64) uint32_t rest[kTileRows * P] = {};
  __builtin_memcpy(rest, right, size_t((k + 1) / 2) * P * 4);
  step(at, rest);
}

// The six products of parts, small ones first.
template <bool kAll>
SK_INLINE void multiply_parts(Needed needed, int64_t k, const uint32_t* left, const uint32_t* right,
                              Splitter& splitter) {
  const auto left_part = [&](int part) {
    load_left<kAll>(needed, reinterpret_cast<const char*>(left + part * kStepWords), kTileRowBytes);
  };
  const auto right_part = [&](int part) {
    load_right<kAll>(needed, right + part * kStepWords, kTileRowBytes, kTileWords);
  };
  const auto multiply = [&] { multiply_tiles<kAll>(needed, [&] { splitter.advance(); }); };
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

// The accumulators: the sums so far, or 0. Sums that stay in tiles for all of k are not as exact as
// sums of stretches: gram of 768x3072 fp32 numbers had an error of 5.5e-7 so, and has 1e-7. What
// becomes bf16 does not show it.
SK_INLINE void begin_tiles(bool add, const float* c) {
  constexpr int P = Pairs::kPanel, kHalf = kTileRows;
  if (!add) return zero_tiles();
  tile_load<kC00>(c, P * 4);
  tile_load<kC10>(c + kHalf * P, P * 4);
  tile_load<kC01>(c + kHalf, P * 4);
  tile_load<kC11>(c + kHalf * P + kHalf, P * 4);
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
// block. A block is finished after the instructions of the next one were given, which need no
// vector units.
template <bool kSpareUpper, class Scratch, class Prepare, class Multiply>
SK_INLINE void blocks_of_job(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                             const Scratch& scratch, int64_t longest, const Prepare& prepare,
                             const Multiply& multiply) {
  constexpr int P = Pairs::kPanel;
  const int64_t m = p.a.cols, n = p.b.cols, k_rows = p.a.rows;
  const Stretches stretches(k_rows, longest);
  struct {
    int64_t bi, bj;
    int rows, cols;
    float* c = nullptr;
  } waiting;
  const bool pairs = only_pairs(p), of_rows = only_rows(p);
  const auto finish_waiting = [&] {
    if (waiting.c == nullptr) return;
    if (of_rows)
      finish_rows(p, waiting.bi, waiting.bj, waiting.rows, waiting.cols, waiting.c);
    else if (pairs)
      finish_pairs(p, waiting.bi, waiting.bj, waiting.rows, waiting.cols, waiting.c);
    else
      finish_block<float>(p, waiting.bi, waiting.bj, waiting.rows, waiting.cols, waiting.c);
  };
  bool odd = false;
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
        // With one stretch the blocks never leave L1.
        float* c = scratch.result +
                   (stretches.count == 1 ? odd : (bi - i0) * (j1 - j0) + (bj - j0)) * P * P;
        odd = !odd;
        const Range k = nonzero_rows<false>(p.b_shape, bj * P, P, of_a.begin, of_a.end);
        const bool tall = rows > kTileRows, wide = cols > kTileRows;
        // The fourth tile of a block on the diagonal costs less than to leave it out, but for
        // parts.
        const bool spare = lower && kSpareUpper;
        const Needed needed = {wide && !spare, tall, tall && wide};
        if (first && (!needed.all() || k.end <= k.begin)) clear_block(c);
        if (k.end > k.begin) multiply(needed, bi, bj, k, c, !first);
        if (!last) continue;
        finish_waiting();
        waiting = {bi, bj, rows, cols, c};
      }
    }
  }
  finish_waiting();
}

// The operands of a job as the instructions read them: where they lie, or made in the scratch
// memory a stretch at a time.
class PairOperands {
 public:
  PairOperands(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
               const PairScratch& scratch)
      : p_(p), i0_(i0), i1_(i1), j0_(j0), j1_(j1), scratch_(scratch) {}

  void prepare(int64_t k0, int64_t k1) {
    k0_ = k0;
    for (int64_t bi = i0_; bi < i1_ && (p_.rows || !p_.a.left); bi++) left(bi, k0, k1);
    for (int64_t bj = j0_; bj < j1_ && p_.rows; bj++) right(bj, k0, k1);
    bring(k1 < p_.a.rows ? k1 : 0, k1 - k0);
  }

  LeftTiles left_of(int64_t bi, int64_t k) const {
    if (direct(bi)) return {row(bi, k), p_.rows.row_stride * 2, kStepRows * 2};
    const uint32_t* at = p_.a.left ? image(p_.a, bi, k) : made(scratch_.left, bi - i0_, k);
    return {reinterpret_cast<const char*>(at)};
  }
  const uint32_t* right_of(int64_t bj, int64_t k) const {
    return p_.rows ? made(scratch_.right, bj - j0_, k) : panel(p_.b, bj, k);
  }
  Ahead ahead;

 private:
  static constexpr int P = Pairs::kPanel;

  static const uint32_t* panel(const Panels& x, int64_t index, int64_t k) {
    return static_cast<const uint32_t*>(x.data) + index * x.stride + k / 2 * P;
  }
  static const uint32_t* image(const Panels& x, int64_t index, int64_t k) {
    return image_block(x, k / kStepRows, index);
  }
  uint32_t* made(uint32_t* tiles, int64_t at, int64_t k) const {
    return tiles + at * kPairWords + (k - k0_) / kStepRows * kStepWords;
  }

  // Whether rows of the caller's matrix can be multiplied where they lie: 32 of them, whole steps,
  // and not so far apart that they share few places of the cache.
  bool direct(int64_t index) const {
    constexpr int64_t kNear = 1024;
    return p_.rows && rows_are_words_ && (index + 1) * P <= p_.rows.rows &&
           p_.rows.row_stride * 2 <= kNear;
  }
  const char* row(int64_t index, int64_t k) const {
    return static_cast<const char*>(p_.rows.data) + (index * P * p_.rows.row_stride + k) * 2;
  }

  void left(int64_t bi, int64_t k0, int64_t k1) {
    if (direct(bi)) return;
    const int64_t at = bi - i0_;
    if (p_.rows) return left_pairs_of_rows(p_.rows, bi * P, {k0, k1}, made(scratch_.left, at, k0));
    const Range k = nonzero_rows<false>(p_.a_shape, bi * P, P, k0, k1);
    if (k.end > k.begin)
      left_pairs(panel(p_.a, bi, k.begin), k.end - k.begin, made(scratch_.left, at, k.begin));
  }

  // Out of the left operand of the same rows.
  void right(int64_t bj, int64_t k0, int64_t k1) {
    uint32_t* to = made(scratch_.right, bj - j0_, k0);
    if (!direct(bj)) {
      const bool known = bj >= i0_ && bj < i1_;
      if (!known) left_pairs_of_rows(p_.rows, bj * P, {k0, k1}, to);
      return right_pairs(known ? made(scratch_.left, bj - i0_, k0) : to, k1 - k0, to);
    }
    const int64_t stride = p_.rows.row_stride / 2;
    for (int64_t k = k0; k < k1; k += kStepRows)
      for (int half = 0; half < 2; half++, to += kTileWords)
        transpose_words(reinterpret_cast<const uint32_t*>(row(bj, k)) + half * kTileRows * stride,
                        stride, kTileRows, to);
  }

  // What lies in memory of the stretch from row k on.
  void bring(int64_t k, int64_t rows) {
    const int64_t steps = ceil_div(p_.a.rows, int64_t(kStepRows));
    ahead.start(p_.a.left ? image(p_.a, i0_, k) : nullptr, steps * kStepWords, i1_ - i0_,
                p_.rows ? nullptr : panel(p_.b, j0_, k), p_.b.stride, j1_ - j0_,
                rows / kStepRows * kStepWords);
  }

  const Product& p_;
  const int64_t i0_, i1_, j0_, j1_;
  const PairScratch& scratch_;
  const bool rows_are_words_ = p_.rows.row_stride % 2 == 0 && p_.a.rows % kStepRows == 0 &&
                               reinterpret_cast<uintptr_t>(p_.rows.data) % 4 == 0;
  int64_t k0_ = 0;
};

static void pair_product_blocks(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                                void* memory) {
  const PairScratch scratch(memory, i1 - i0, j1 - j0);
  PairOperands operands(p, i0, i1, j0, j1, scratch);
  const bool narrow = only_pairs(p) || only_rows(p);
  tiles_configure();
  blocks_of_job<false>(
      p, i0, i1, j0, j1, scratch, kPairStretch,
      [&](int64_t k0, int64_t k1) { operands.prepare(k0, k1); },
      [&](Needed needed, int64_t bi, int64_t bj, Range k, float* c, bool add) {
        const bool of_rows = bool(p.rows);
        const int64_t count = k.end - k.begin;
        const LeftTiles left = operands.left_of(bi, k.begin);
        const uint32_t* right = operands.right_of(bj, k.begin);
        begin_tiles(add && narrow, c);
        if (of_rows && needed.all())
          multiply_pairs<true, true>(needed, count, left, right, operands.ahead);
        else if (of_rows)
          multiply_pairs<false, true>(needed, count, left, right, operands.ahead);
        else if (needed.all())
          multiply_pairs<true, false>(needed, count, left, right, operands.ahead);
        else
          multiply_pairs<false, false>(needed, count, left, right, operands.ahead);
        put_tiles(needed, add && !narrow, Scales{}, c);
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
  if (p.whole || !splitting_pays(p)) return product_blocks<float, float>(p, i0, i1, j0, j1, memory);
  constexpr int P = Pairs::kPanel;
  const SplitScratch scratch(memory, i1 - i0, j1 - j0);
  const float *a = static_cast<const float*>(p.a.data), *b = static_cast<const float*>(p.b.data);
  Splitter::Parts parts[2];
  for (int64_t i = 0; i < 2; i++) {
    parts[i].left = scratch.left + i * (i1 - i0) * kSplitWords;
    parts[i].right = scratch.right + i * (j1 - j0) * kSplitWords;
  }
  Splitter splitter(p, i0, i1, j0, j1);
  const Splitter::Parts* now = parts + 1;
  int64_t begin = 0;  // of the stretch
  const auto offset = [&](const Range& k) {
    return (k.begin - begin) / kStepRows * kParts * kStepWords;
  };
  tiles_configure();
  blocks_of_job<true>(
      p, i0, i1, j0, j1, scratch, kSplitStretch,
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
          multiply_parts<true>(needed, count, left, right, splitter);
        else
          multiply_parts<false>(needed, count, left, right, splitter);
        put_tiles(needed, add, scales, c);
      });
  tiles_release();
}

// Whether the operand of a symmetric product can be read where it is: rows of pairs.
static bool reads_rows(const Product& p) {
  return p.a.kind == Kind::kBF16 && p.rows.dtype == DType::kBF16 && p.rows.col_stride == 1;
}

// Instructions on registers alone: what the ceiling is measured with. The clock depends on the
// numbers: with tiles that change at every instruction, read from L1, 3,060 GFLOP/s were measured
// where these, which are zeros, or any four again and again gave 3,600.
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
