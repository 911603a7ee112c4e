// The image of a packed bf16 matrix that products on tiles read as their left operand
// (Panels::left), written where the panels are: a block is in L1 then, and often its transpose too.
//
// A tile is 16 rows of 16 words, a word two bf16 numbers that are neighbours along k. As the right
// operand it holds words of one pair of rows of the panel along its rows, as the left one words of
// one column: the transposed words. A block of 32 x 32 numbers is a step of k of two tiles, one for
// each half of its columns.

constexpr int kTileRows = 16;        // rows of a tile, and its 32-bit words a row
constexpr int kTileWords = 16 * 16;  // of a tile

constexpr int kStepRows = 2 * kTileRows;    // rows of k that an instruction multiplies
constexpr int kStepWords = 2 * kTileWords;  // of a panel in such a step

SK_INLINE uint32_t* image_block(const Panels& p, int64_t bi, int64_t bj) {
  const int64_t steps = ceil_div(p.rows, int64_t(kStepRows));
  return static_cast<uint32_t*>(p.left) + (bj * steps + bi) * kStepWords;
}

// The words of neighbours in a row of 32 numbers.
SK_INLINE void store_neighbours(uint32_t* to, const Vector<float> (&row)[2]) {
#if SK_HAS_BF16_DOT
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)row[1], (__m512)row[0]));
#else
  for (int w = 0; w < kTileRows; w++) {
    const Vector<float>& of = row[w / (kTileRows / 2)];
    const int at = 2 * w % kTileRows;
    to[w] = (round_bf16(bits_of(of[at])) >> 16) | (round_bf16(bits_of(of[at + 1])) & 0xffff0000u);
  }
#endif
}

// Block (bi, bj), whose first `rows` rows are given; its transpose too where that is known.
static void store_image(const Panels& p, int64_t bi, int64_t bj, int rows, const float* block,
                        const float* transposed) {
  constexpr int P = Simd<float>::kPanel;
  alignas(64) Block<float> whole, other;
  if (rows < P) {  // what lies beyond is whatever it was
    clear_block(whole);
    __builtin_memcpy(whole, block, size_t(rows) * P * sizeof(float));
    block = whole;
    transposed = nullptr;
  }
  if (transposed == nullptr) {
    transpose_block(block, other);
    transposed = other;
  }
  uint32_t* to = image_block(p, bi, bj);
  for (int j = 0; j < P; j++, to += kTileRows, transposed += P) {
    const Vector<float> row[2] = {load(transposed), load(transposed + kTileRows)};
    store_neighbours(to, row);
  }
}
