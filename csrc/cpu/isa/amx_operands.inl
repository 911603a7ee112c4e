// The operands of products on tiles: panels in the form that the instructions read.
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

constexpr int kParts = 3;  // of an fp32 number

// Rows of k at a time: one left panel, as the instructions read it, and a right one stay in L1.
constexpr int64_t kPairStretch = 256, kSplitStretch = 96;
static_assert(kPairStretch % kStepRows == 0 && kSplitStretch % kStepRows == 0);

// The largest jobs: the result and the operands stay in an L2 of 2 MiB.
constexpr int64_t kPairEdge = 12, kSplitEdge = 12;

// Words of a panel as the instructions read it, in one stretch of k: for every step, part and half
// of the columns, a tile.
constexpr int64_t kPairWords = kPairStretch / kStepRows * kStepWords;
constexpr int64_t kSplitWords = kSplitStretch / kStepRows * kParts * kStepWords;

// ---------------------------------------------------------------- operands

// The 16 x 16 words of a tile transposed. Rows from `rows` on are taken for 0.
SK_INLINE void transpose_words(const uint32_t* in, int64_t stride, int rows, uint32_t* out,
                               int64_t out_stride = kTileRows) {
  Vector<float> row[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
    row[i] = i < rows ? load(reinterpret_cast<const float*>(in + i * stride)) : Vector<float>{};
  Transpose<float>::stage<kTileRows / 2>(row);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) store(reinterpret_cast<float*>(out + i * out_stride), row[i]);
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

// Rows of a strided matrix are too far apart for the processor to guess the next. This many ahead;
// beyond the last row it costs nothing.
constexpr int kRowsAhead = 8;

template <class T>
SK_INLINE void bring_row(const T* row, int64_t numbers) {
  for (int64_t i = 0; i < numbers; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

// 32 rows of a strided matrix of bf16 numbers, from row `first` on, as left operands: its words are
// the pairs. Zeros beyond its rows and beyond k.
static void left_pairs_of_rows(const Matrix& x, int64_t first, Range k, uint32_t* tiles) {
  constexpr int P = Pairs::kPanel;
  const int rows = int(x.rows - first < P ? x.rows - first : P);
  const BF16* from = static_cast<const BF16*>(x.data) + first * x.row_stride + k.begin;
  for (int64_t left = k.end - k.begin; left > 0;
       left -= kStepRows, from += kStepRows, tiles += kStepWords) {
    const bool whole = rows == P && left >= kStepRows;
    if (!whole) __builtin_memset(tiles, 0, kStepWords * 4);
    for (int r = 0; r < rows; r++) {
      uint32_t* to = tiles + r * kTileRows;
      bring_row(from + (r + kRowsAhead) * x.row_stride, kStepRows);
      if (left >= kStepRows)
        __builtin_memcpy(to, from + r * x.row_stride, kTileRowBytes);
      else
        __builtin_memcpy(to, from + r * x.row_stride, size_t(left) * 2);
    }
  }
}

// Left operands as right ones; `to` may be `from`.
static void right_pairs(const uint32_t* from, int64_t k, uint32_t* to) {
  const int64_t tiles = ceil_div(k, int64_t(kStepRows)) * 2;
  for (int64_t t = 0; t < tiles; t++)
    transpose_words(from + t * kTileWords, kTileRows, kTileRows, to + t * kTileWords);
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

SK_INLINE Words magnitude(Vector<float> x) { return (Words)x & 0x7fffffffu; }
SK_INLINE Words magnitude(const float* p) { return magnitude(load(p)); }
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

// Rows of the transposed matrix, `steps` panels of it.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0, steps = 0;
  int count = 0;

  void get(int r, int64_t s, Vector<float>& low, Vector<float>& high) const {
    const float* at = data + s * stride + r * Pairs::kPanel;
    low = load(at);
    high = load(at + Pairs::kLanes);
  }
};

// The columns as rows of the transposed matrix.
static void look_at_rows(const Rows& rows, Columns& columns) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  const auto row_maxima = [&](int r) {
    Words most = {};
    for (int64_t s = 0; s < rows.steps; s++) {
      Vector<float> low, high;
      rows.get(r, s, low, high);
      most = larger(most, larger(magnitude(low), magnitude(high)));
    }
    return most;
  };
  columns.finite = true;
  columns.scaled = false;
  bool usual = true;
  Words most = {};
  for (int r = 0; r < rows.count; r++) {
    const Words of_row = row_maxima(r);
    usual = usual && (any(of_row >= kSmallestBits) || !any(of_row > 0u));
    most = larger(most, of_row);
  }
  if (usual && !any(most > kLargestBits)) return;
  uint32_t largest[P] = {};
  for (int r = 0; r < rows.count; r++) {
    const Words of_row = row_maxima(r);
    for (int l = 0; l < kLanes; l++) largest[r] = of_row[l] > largest[r] ? of_row[l] : largest[r];
  }
  judge_columns(largest, columns);
}

#if defined(SK_EMULATE_TILES)
SK_INLINE Words upper_halves(Words low, Words high) { return (high & 0xffff0000u) | (low >> 16); }
#else
SK_INLINE Words upper_halves(Words low, Words high) {
  const __m512i kUpper =
      _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15, 45,
                       13, 43, 11, 41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
  return (Words)_mm512_permutex2var_epi16((__m512i)low, kUpper, (__m512i)high);
}
#endif

// Pairs of the nearest bf16 numbers of two vectors, which are left with the rest.
SK_INLINE Words take_part(Vector<float>& low, Vector<float>& high) {
  constexpr uint32_t kHalf = 0x8000u, kUpper = 0xffff0000u;
  const Words a = (Words)low + kHalf, b = (Words)high + kHalf;
  low -= (Vector<float>)(a & kUpper);
  high -= (Vector<float>)(b & kUpper);
  return upper_halves(a, b);
}

// The magnitudes of bf16 numbers, two a word.
typedef uint16_t Halves __attribute__((vector_size(SK_VECTOR_BYTES)));

// The words of two vectors to the same place in the tiles of their parts; `most` keeps the largest
// of the first ones. What is left for the third part has 8 bits and needs no rounding.
SK_INLINE void store_parts(Vector<float> low, Vector<float> high, uint32_t* to, Halves& most) {
  const Words first = take_part(low, high);
  store(reinterpret_cast<float*>(to), (Vector<float>)first);
  store(reinterpret_cast<float*>(to + kStepWords), (Vector<float>)take_part(low, high));
  store(reinterpret_cast<float*>(to + 2 * kStepWords),
        (Vector<float>)upper_halves((Words)low, (Words)high));
  const Halves magnitudes = (Halves)(first & 0x7fff7fffu);
  most = magnitudes > most ? magnitudes : most;
}

constexpr uint16_t kSmallestHalf = kSmallestBits >> 16, kLargestHalf = kLargestBits >> 16;

// Whether columns whose largest elements are these may need scaling: asked of every stretch, so
// that only few have to be looked at.
SK_INLINE bool suspicious(Halves most) {
  const Words words = (Words)most, low = words & 0xffffu, high = words >> 16,
              largest = larger(low, high);
  return any((largest < uint32_t(kSmallestHalf)) | (largest > uint32_t(kLargestHalf)));
}
SK_INLINE bool suspicious_row(Halves most) {
  const auto over = [&](uint16_t bound) {
    const auto flags = most > bound;
    return any((Flags)flags);
  };
  return !over(kSmallestHalf - 1) || over(kLargestHalf);
}

// A step of a panel of fp32 numbers as right operands is brought into form in pieces of four rows
// of words of one half of the columns. Of the step there are `k` rows, zeros beyond. Row i is
// paired with row i + 16: which rows are pairs is free as long as both operands agree, and so
// neither image needs a permutation. `most` keeps the largest magnitudes of the half.
constexpr int kPieces = 8;

template <bool kScaled>
SK_INLINE void right_piece(const float* panel, int64_t k, int piece, const Columns& columns,
                           uint32_t* tiles, Halves* most) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes, kRows = kTileRows / (kPieces / 2);
  const int half = piece / (kPieces / 2), first = piece % (kPieces / 2) * kRows;
  Vector<float> exponent = {};
  if constexpr (kScaled) exponent = -load(columns.exponent + half * kLanes);
  panel += half * kLanes;
  tiles += half * kTileWords;
  Halves largest = most[half];
#pragma GCC unroll 4
  for (int i = first; i < first + kRows; i++) {
    Vector<float> low = i < k ? load(panel + i * P) : Vector<float>{},
                  high = i + kTileRows < k ? load(panel + (i + kTileRows) * P) : Vector<float>{};
    if constexpr (kScaled) {
      low = times_power_of_two(low, exponent);
      high = times_power_of_two(high, exponent);
    }
    store_parts(low, high, tiles + i * kTileRows, largest);
  }
  most[half] = largest;
}

static void scaled_right_parts(const float* panel, int64_t k, const Columns& columns,
                               uint32_t* tiles) {
  constexpr int P = Pairs::kPanel;
  Halves most[2] = {};
  for (; k > 0; k -= kStepRows, panel += kStepRows * P, tiles += kParts * kStepWords)
    for (int piece = 0; piece < kPieces; piece++)
      right_piece<true>(panel, k, piece, columns, tiles, most);
}

// Row r as a row of left operands. Returns whether it is suspicious.
template <bool kScaled>
SK_INLINE bool left_row(const Rows& rows, int r, const Columns& columns, uint32_t* tiles) {
  Halves most = {};
  uint32_t* to = tiles + r * kTileRows;
  for (int64_t s = 0; s < rows.steps; s++, to += kParts * kStepWords) {
    Vector<float> low, high;
    rows.get(r, s, low, high);
    if constexpr (kScaled) {
      const Vector<float> exponent = Vector<float>{} - columns.exponent[r];
      low = times_power_of_two(low, exponent);
      high = times_power_of_two(high, exponent);
    }
    store_parts(low, high, to, most);
  }
  return suspicious_row(most);
}

// Brings the panels of a job into the form of the instructions, a stretch after the other, in small
// portions: those of the next stretch are made between the tile instructions of this one, which
// leave the vector units free.
class Splitter {
 public:
  struct Parts {
    uint32_t *left, *right;
    Columns of_a[kSplitEdge], of_b[kSplitEdge];
  };

  Splitter(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1)
      : p_(p),
        i0_(i0),
        j0_(j0),
        rights_(j1 - j0),
        // A job on the diagonal of a symmetric product of one matrix has the same panels twice.
        shared_(!p.a_t && p.symmetric && i0 == j0 && i1 == j1 && p.a.data == p.b.data &&
                p.a.stride == p.b.stride && p.a_shape == p.b_shape),
        panels_(rights_ + (shared_ ? 0 : i1 - i0)) {}

  void start(Parts& parts, int64_t k0, int64_t k1) {
    parts_ = &parts;
    k0_ = k0;
    k1_ = k1;
    panel_ = -1;
    next_panel();
  }

  // One portion, if there is one.
  void advance() {
    switch (phase_) {
      case Phase::kDone:
        return;
      case Phase::kRight:
        return right();
      case Phase::kRows:
        return rows();
      case Phase::kTranspose:
        return transpose();
    }
  }

  void finish() {
    while (phase_ != Phase::kDone) advance();
  }

 private:
  enum class Phase { kDone, kRight, kRows, kTranspose };

  bool is_left() const { return panel_ >= rights_; }

  void next_panel() {
    constexpr int P = Pairs::kPanel;
    while (++panel_ < panels_) {
      const bool left = is_left();
      const int64_t at = left ? panel_ - rights_ : panel_, index = (left ? i0_ : j0_) + at;
      const Panels& from = left ? p_.a : p_.b;
      const Range k = nonzero_rows<false>(left ? p_.a_shape : p_.b_shape, index * P, P, k0_, k1_);
      rows_ = k.end - k.begin;
      if (rows_ <= 0) continue;
      const int64_t offset = at * kSplitWords + (k.begin - k0_) / kStepRows * kParts * kStepWords;
      columns_ = left ? &parts_->of_a[at] : &parts_->of_b[at];
      columns_->finite = true;
      columns_->scaled = false;
      steps_ = ceil_div(rows_, int64_t(kStepRows));
      step_ = portion_ = 0;
      tiles_ = (left ? parts_->left : parts_->right) + offset;
      transposed_ = left ? tiles_ : parts_->left + offset;
      if (left && p_.a_t) {
        phase_ = Phase::kRows;
        suspicious_ = false;
        given_.data = static_cast<const float*>(p_.a_t.data) + k.begin / kStepRows * p_.a_t.stride +
                      index * P * P;
        given_.stride = p_.a_t.stride;
        given_.steps = steps_;
        given_.count = int(p_.a.cols - index * P < P ? p_.a.cols - index * P : P);
      } else {
        source_ = static_cast<const float*>(from.data) + index * from.stride + k.begin * P;
        phase_ = Phase::kRight;
        most_[0] = most_[1] = Halves{};
      }
      return;
    }
    phase_ = Phase::kDone;
  }

  void right() {
    constexpr int P = Pairs::kPanel;
    right_piece<false>(source_ + step_ * kStepRows * P, rows_ - step_ * kStepRows, portion_,
                       *columns_, tiles_ + step_ * kParts * kStepWords, most_);
    if (++portion_ < kPieces) return;
    portion_ = 0;
    if (++step_ < steps_) return;
    if (suspicious(most_[0]) || suspicious(most_[1])) {
      look_at_columns(source_, rows_, *columns_);
      if (columns_->finite && columns_->scaled)
        scaled_right_parts(source_, rows_, *columns_, tiles_);
    }
    if (!shared_ && !is_left()) return next_panel();
    if (shared_) parts_->of_a[panel_] = *columns_;
    if (!columns_->finite) return next_panel();
    phase_ = Phase::kTranspose;
  }

  void transpose() {
    transpose_words(tiles_ + portion_ * kTileWords, kTileRows, kTileRows,
                    transposed_ + portion_ * kTileWords);
    if (++portion_ == steps_ * kParts * 2) next_panel();
  }

  void rows() {
    constexpr int P = Pairs::kPanel;
    if (left_row<false>(given_, int(portion_), *columns_, tiles_)) suspicious_ = true;
    if (++portion_ < given_.count) return;
    if (suspicious_) {
      look_at_rows(given_, *columns_);
      for (int r = 0; r < given_.count && columns_->finite && columns_->scaled; r++)
        left_row<true>(given_, r, *columns_, tiles_);
    }
    for (int64_t t = 0; t < steps_ * kParts && given_.count < P; t++)
      __builtin_memset(tiles_ + t * kStepWords + given_.count * kTileRows, 0,
                       size_t(P - given_.count) * kTileRows * 4);
    next_panel();
  }

  const Product& p_;
  const int64_t i0_, j0_, rights_;
  const bool shared_;
  const int64_t panels_;

  Parts* parts_ = nullptr;
  int64_t k0_ = 0, k1_ = 0;
  Phase phase_ = Phase::kDone;
  // The panel in work: first the right ones, then those of the left operand.
  int64_t panel_ = 0, rows_ = 0, steps_ = 0, step_ = 0;
  int portion_ = 0;
  Rows given_;
  bool suspicious_ = false;
  const float* source_ = nullptr;
  uint32_t *tiles_ = nullptr, *transposed_ = nullptr;
  Columns* columns_ = nullptr;
  Halves most_[2] = {};
};
