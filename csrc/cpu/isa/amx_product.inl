// Products of BF16 panels on tiles. A panel's rows of pairs are what an instruction reads as its
// right operand; as the left operand it wants pairs along the rows, so stretches of the left panels
// are transposed on the way, once for all blocks of a tile of the result.

#include "amx_tiles.inl"

using Pairs = Simd<float>;
static_assert(Pairs::kPanel == 2 * kTileRows, "a block is 2 x 2 tiles");

constexpr int kLeftTiles = SK_BLOCK_K / kTileRows * 2;

// Pairs [0, k) of a panel to tiles: of columns 0 to 15 and of 16 to 31, for every 16 pairs, zeros
// beyond k.
static void transpose_left(const uint32_t* panel, int64_t k, uint32_t* tiles) {
  for (int64_t k0 = 0; k0 < k; k0 += kTileRows)
    for (int half = 0; half < 2; half++, tiles += kTileWords) {
      Vector<float> row[kTileRows];
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++)
        row[i] = k0 + i < k ? load(reinterpret_cast<const float*>(panel + (k0 + i) * Pairs::kPanel +
                                                                  half * kTileRows))
                            : Vector<float>{};
      Transpose<float>::stage<kTileRows / 2>(row);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++)
        store(reinterpret_cast<float*>(tiles + i * kTileRows), row[i]);
    }
}

// Which of the four tiles of a block are computed.
struct Needed {
  bool upper_right, lower_left, lower_right;
};

enum Register : int { kC00, kC01, kC10, kC11, kA0, kA1, kB0, kB1 };

SK_INLINE void tile_step(Needed needed, const uint32_t* left, const uint32_t* right) {
  constexpr int64_t kStride = Pairs::kPanel * 4;
  tile_load<kB0>(right, kStride);
  tile_load<kA0>(left, kTileRowBytes);
  tile_multiply_add<kC00, kA0, kB0>();
  if (needed.lower_left) {
    tile_load<kA1>(left + kTileWords, kTileRowBytes);
    tile_multiply_add<kC10, kA1, kB0>();
  }
  if (needed.upper_right || needed.lower_right) tile_load<kB1>(right + kTileRows, kStride);
  if (needed.upper_right) tile_multiply_add<kC01, kA0, kB1>();
  if (needed.lower_right) tile_multiply_add<kC11, kA1, kB1>();
}

template <int tile, bool kAdd>
SK_INLINE void put_tile(float* c) {
  constexpr int P = Pairs::kPanel;
  if constexpr (!kAdd) {
    tile_store<tile>(c, P * 4);
  } else {
    alignas(64) float sums[kTileWords];
    tile_store<tile>(sums, kTileRowBytes);
    for (int i = 0; i < kTileRows; i++)
      store(c + i * P, load(c + i * P) + load(sums + i * kTileRows));
  }
}

// c = or += the product of k pairs of a transposed left panel and of a right one.
template <bool kAdd>
static void tile_block_product(Needed needed, int64_t k, const uint32_t* left,
                               const uint32_t* right, float* c) {
  constexpr int P = Pairs::kPanel;
  tile_zero<kC00>();
  tile_zero<kC01>();
  tile_zero<kC10>();
  tile_zero<kC11>();
  for (; k >= kTileRows; k -= kTileRows, left += 2 * kTileWords, right += kTileRows * P)
    tile_step(needed, left, right);
  if (k > 0) {  // what follows the last pairs is not zero, and may not be ours
    alignas(64) uint32_t rest[kTileRows * P] = {};
    __builtin_memcpy(rest, right, size_t(k) * P * 4);
    tile_step(needed, left, rest);
  }
  put_tile<kC00, kAdd>(c);
  if (needed.upper_right) put_tile<kC01, kAdd>(c + kTileRows);
  if (needed.lower_left) put_tile<kC10, kAdd>(c + kTileRows * P);
  if (needed.lower_right) put_tile<kC11, kAdd>(c + kTileRows * P + kTileRows);
}

static void tile_product_blocks(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                                void* scratch) {
  constexpr int P = Pairs::kPanel;
  const int64_t m = p.a.cols, n = p.b.cols, k_rows = (p.a.rows + 1) / 2;
  // As in product_blocks, but of whole tiles, so that triangular operands begin at one.
  const int64_t stretches = k_rows > 0 ? ceil_div(k_rows, int64_t(SK_BLOCK_K)) : 1;
  const int64_t stretch = ceil_div(ceil_div(k_rows, stretches), int64_t(kTileRows)) * kTileRows;
  float* tile = static_cast<float*>(scratch);
  alignas(64) uint32_t left[kLeftTiles * kTileWords];
  tiles_configure();
  for (int64_t s = 0; s < stretches; s++) {
    const int64_t k0 = s * stretch, k1 = k0 + stretch < k_rows ? k0 + stretch : k_rows;
    const bool first = s == 0, last = s == stretches - 1;
    for (int64_t bi = i0; bi < i1; bi++) {
      const int rows = int(m - bi * P < P ? m - bi * P : P);
      const Range of_a = nonzero_rows<true>(p.a_shape, bi * P, P, k0, k1);
      transpose_left(static_cast<const uint32_t*>(p.a.data) + bi * p.a.stride + of_a.begin * P,
                     of_a.end - of_a.begin, left);
      const int64_t past = p.symmetric && bi + 1 < j1 ? bi + 1 : j1;
      for (int64_t bj = j0; bj < past; bj++) {
        const int cols = int(n - bj * P < P ? n - bj * P : P);
        const bool lower = p.symmetric && bi == bj;
        float* c = stretches == 1 ? tile : tile + ((bi - i0) * (j1 - j0) + (bj - j0)) * P * P;
        const Range k = nonzero_rows<true>(p.b_shape, bj * P, P, of_a.begin, of_a.end);
        const int64_t count = k.end > k.begin ? k.end - k.begin : 0;
        const uint32_t* a = left + (k.begin - of_a.begin) / kTileRows * 2 * kTileWords;
        const uint32_t* b = static_cast<const uint32_t*>(p.b.data) + bj * p.b.stride + k.begin * P;
        const bool tall = rows > kTileRows, wide = cols > kTileRows;
        const Needed needed = {wide && !lower, tall, tall && wide};
        if (first) {
          if (!tall || !wide || lower) clear_block(c);
          tile_block_product<false>(needed, count, a, b, c);
        } else if (count > 0) {
          tile_block_product<true>(needed, count, a, b, c);
        }
        if (last) finish_block<float>(p, bi, bj, rows, cols, c);
      }
    }
  }
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
