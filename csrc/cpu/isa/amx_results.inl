// What products of bf16 panels write where all of it is bf16: panels of pairs with their images, or
// rows of the caller's matrix.

// A product of two matrices is symmetric but for its rounding.
static bool is_exactly_symmetric(const Product& p) {
  return !p.symmetric || (p.a.data == p.b.data && p.a.left == p.b.left);
}

// Whether all that a product writes are pairs, and what it adds too.
static bool only_pairs(const Product& p) {
  const auto pairs = [](const Panels& x) { return !x || x.kind == Kind::kBF16; };
  return pairs(p.out) && pairs(p.out_t) && (p.out || p.out_t) && !p.copy && !p.scaled && !p.store &&
         p.beta == 0 && p.gamma == 0 && (p.beta_panels == 0 || p.add_panels.kind == Kind::kBF16) &&
         is_exactly_symmetric(p);
}

// Whether all that it writes are rows of bf16 numbers.
static bool only_rows(const Product& p) {
  return p.store && p.store.dtype == DType::kBF16 && p.store.col_stride == 1 && !p.out &&
         !p.out_t && !p.copy && !p.scaled && p.beta == 0 && p.gamma == 0 && p.beta_panels == 0 &&
         p.alpha == 1 && p.symmetric && is_exactly_symmetric(p);
}

// A block as both operands of products, and its transpose as both, take two conversions: its rows
// in pairs, and the neighbours in its rows. The other two are their words transposed.
struct BlockPairs {
  static constexpr int P = Pairs::kPanel;
  uint32_t *right, *left_t;
  alignas(64) uint32_t own_right[kTileRows * P], own_left_t[kStepWords];

  // alpha c + beta e.
  inline __attribute__((always_inline)) void form(float alpha, const float* c, float beta,
                                                  const uint32_t* e) {
    constexpr int kLanes = Pairs::kLanes;
    for (int i = 0; i < kTileRows; i++, c += 2 * P) {
      Vector<float> even[2], odd[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        even[half] = alpha * load(c + half * kLanes);
        odd[half] = alpha * load(c + P + half * kLanes);
        if (e != nullptr) {
          const Words words = *reinterpret_cast<const UnalignedWords*>(e + i * P + half * kLanes);
          even[half] += beta * (Vector<float>)(words << 16);
          odd[half] += beta * (Vector<float>)(words & 0xffff0000u);
        }
        store_pairs(right + i * P + half * kLanes, even[half], odd[half]);
      }
      store_neighbours(left_t + 2 * i * kTileRows, even);
      store_neighbours(left_t + (2 * i + 1) * kTileRows, odd);
    }
  }

  // To block (bi, bj) of `to`, whose first `rows` rows exist.
  void put(const Panels& to, int64_t bi, int64_t bj, int rows) const {
    if (to.data && right != pair_block(to, bi, bj)) copy(right, pair_block(to, bi, bj), rows);
    if (!to.left) return;
    uint32_t* image = image_block(to, bi, bj);
    for (int half = 0; half < 2; half++)
      transpose_words(right + half * kTileRows, P, kTileRows, image + half * kTileWords);
  }
  // The transpose of the block.
  void put_transposed(const Panels& to, int64_t bi, int64_t bj, int rows) const {
    if (to.left && left_t != image_block(to, bi, bj)) copy(left_t, image_block(to, bi, bj), P);
    if (!to.data) return;
    alignas(64) uint32_t words[kTileRows * P];
    uint32_t *const block = pair_block(to, bi, bj), *const at = rows == P ? block : words;
    for (int half = 0; half < 2; half++)
      transpose_words(left_t + half * kTileWords, kTileRows, kTileRows, at + half * kTileRows, P);
    if (at != block) copy(words, block, rows);
  }

  // Rows of 32 numbers, two a word.
  static void copy(const uint32_t* from, uint32_t* to, int rows) {
    for (int i = 0; i < (rows + 1) / 2 * P; i += Pairs::kLanes)
      store(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  }
};

// A block as rows of bf16 numbers of the caller's matrix. The sums have no subnormal numbers, which
// the conversion would drop.
SK_INLINE void put_rows(const Matrix& to, int64_t i, int64_t j, int rows, int cols,
                        const float* c) {
  constexpr int P = Pairs::kPanel;
  BF16* row = static_cast<BF16*>(to.data) + i * P * to.row_stride + j * P;
  for (int r = 0; r < rows; r++, row += to.row_stride, c += P) {
    const Vector<float> numbers[2] = {load(c), load(c + kTileRows)};
    alignas(64) uint32_t words[kTileRows];
    const bool whole = cols == P && reinterpret_cast<uintptr_t>(row) % 4 == 0;
    store_neighbours(whole ? reinterpret_cast<uint32_t*>(row) : words, numbers);
    if (!whole) __builtin_memcpy(row, words, size_t(cols) * 2);
  }
}

// Of a symmetric product.
static void finish_rows(const Product& p, int64_t bi, int64_t bj, int rows, int cols,
                        const float* c) {
  constexpr int P = Pairs::kPanel, kLanes = Pairs::kLanes;
  put_rows(p.store, bi, bj, rows, cols, c);
  if (bi == bj) return;
  // The rows of the transpose are the words of pairs of rows, transposed.
  alignas(64) uint32_t pairs[kTileRows * P], mirrored[kStepWords];
  for (int i = 0; i < kTileRows; i++, c += 2 * P)
#pragma GCC unroll 2
    for (int half = 0; half < P; half += kLanes)
      store_pairs(pairs + i * P + half, load(c + half), load(c + P + half));
  BF16* row = static_cast<BF16*>(p.store.data) + bj * P * p.store.row_stride + bi * P;
  for (int half = 0; half < 2; half++)
    transpose_words(pairs + half * kTileRows, P, kTileRows, mirrored + half * kTileWords);
  for (int r = 0; r < cols; r++, row += p.store.row_stride)
    __builtin_memcpy(row, mirrored + r * kTileRows, rows == P ? kTileRowBytes : size_t(rows) * 2);
}

static void finish_pairs(const Product& p, int64_t bi, int64_t bj, int rows, int cols,
                         const float* c) {
  constexpr int P = Pairs::kPanel;
  const bool mirror = p.symmetric && bi != bj;
  const Panels& transposed = p.out_t ? p.out_t : mirror ? p.out : Panels{};
  BlockPairs pairs;
  pairs.right = p.out.data && rows == P ? pair_block(p.out, bi, bj) : pairs.own_right;
  pairs.left_t = transposed.left ? image_block(transposed, bj, bi) : pairs.own_left_t;
  alignas(64) uint32_t words[kTileRows * P];
  const uint32_t* e = nullptr;
  if (p.beta_panels != 0) {
    e = pair_block(p.add_panels, bi, bj);
    if (rows < P) {
      __builtin_memset(words, 0, sizeof words);
      BlockPairs::copy(e, words, rows);
      e = words;
    }
  }
  pairs.form(float(p.alpha), c, float(p.beta_panels), e);
  if (p.out) pairs.put(p.out, bi, bj, rows);
  if (mirror) pairs.put_transposed(p.out, bj, bi, cols);
  if (p.out_t) pairs.put_transposed(p.out_t, bj, bi, cols);
}
