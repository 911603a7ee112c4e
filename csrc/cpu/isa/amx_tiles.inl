// The eight tile registers as this backend uses them: every tile is 16 rows of 64 bytes. Written as
// assembly because the compilers' intrinsics for loads do not tell that they read memory (GCC 12),
// so that the stores which filled it could be moved past them.

#include "tiles.inl"

constexpr int64_t kTileRowBytes = 64;

#if !defined(SK_EMULATE_TILES)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

// Before the first use of tiles on a thread; what they held is lost.
SK_INLINE void tiles_configure() {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = kTileRowBytes;
    config.rows[i] = kTileRows;
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}
// Unused tiles need not be saved when the thread is suspended.
SK_INLINE void tiles_release() { asm volatile("tilerelease"); }

template <int tile>
SK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
SK_INLINE void tile_load(const void* from, int64_t row_stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0"
               :
               : "i"(tile), "r"(from), "r"(row_stride)
               : "memory");
}
template <int tile>
SK_INLINE void tile_store(void* to, int64_t row_stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(row_stride) : "memory");
}
// c += A B with A's pairs along its rows and B's along its columns.
template <int c, int a, int b>
SK_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#else

// The same in portable C++, after the pseudo-code of TDPBF16PS in Intel's instruction set
// extensions reference, but for subnormal numbers, which the instruction takes for 0. For tests on
// one thread.
struct EmulatedTiles {
  bool configured = false;
  alignas(64) uint32_t words[8][kTileWords];
};
static EmulatedTiles emulated;

SK_INLINE uint32_t* emulated_tile(int tile) {
  if (!emulated.configured) __builtin_trap();
  return emulated.words[tile];
}

SK_INLINE void tiles_configure() {
  emulated.configured = true;
  __builtin_memset(emulated.words, 0, sizeof emulated.words);
}
SK_INLINE void tiles_release() { emulated.configured = false; }

template <int tile>
SK_INLINE void tile_zero() {
  __builtin_memset(emulated_tile(tile), 0, sizeof emulated.words[tile]);
}
template <int tile>
SK_INLINE void tile_load(const void* from, int64_t row_stride) {
  for (int i = 0; i < kTileRows; i++)
    __builtin_memcpy(emulated_tile(tile) + i * kTileRows,
                     static_cast<const char*>(from) + i * row_stride, kTileRowBytes);
}
template <int tile>
SK_INLINE void tile_store(void* to, int64_t row_stride) {
  for (int i = 0; i < kTileRows; i++)
    __builtin_memcpy(static_cast<char*>(to) + i * row_stride, emulated_tile(tile) + i * kTileRows,
                     kTileRowBytes);
}
template <int c, int a, int b>
SK_INLINE void tile_multiply_add() {
  uint32_t *sums = emulated_tile(c), *left = emulated_tile(a), *right = emulated_tile(b);
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < kTileRows; j++) {
      float even = 0, odd = 0;
      for (int k = 0; k < kTileRows; k++) {
        const uint32_t x = left[i * kTileRows + k], y = right[k * kTileRows + j];
        even = __builtin_fmaf(float_of(x << 16), float_of(y << 16), even);
        odd = __builtin_fmaf(float_of(x & 0xffff0000u), float_of(y & 0xffff0000u), odd);
      }
      uint32_t& sum = sums[i * kTileRows + j];
      sum = bits_of(float_of(sum) + (even + odd));
    }
}

#endif
