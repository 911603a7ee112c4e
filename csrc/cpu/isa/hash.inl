// Rounding at random to bfloat16, see rounding.h: integers alone, so that every instruction set
// computes the same. Each includes it in a namespace of its own; what it defines is inlined, so
// that none takes another's instructions.
#define SK_HASH static inline __attribute__((always_inline))

constexpr uint32_t kStride = 0x9e3779b9;

// The finaliser "lowbias32" of Chris Wellons' hash prospector: a permutation of 32 bits of which
// every bit depends on every other.
SK_HASH uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

SK_HASH uint32_t seed_of(uint64_t step, uint64_t row) {
  return mixed(mixed(uint32_t(step)) + uint32_t(row) * kStride);
}

SK_HASH uint16_t rounded(uint32_t bits, uint32_t seed, uint32_t col) {
  const uint32_t size = bits & 0x7fffffffU;
  const uint32_t down = bits >> 16;
  const uint32_t up = (bits + (mixed((seed + col * kStride) ^ down) >> 16)) >> 16;
  // The largest numbers do not become infinite; infinity and NaN keep what they are, a NaN with a
  // bit that bfloat16 has.
  const uint32_t special = down | (size > 0x7f800000U ? 0x40U : 0U);
  return uint16_t(size >= 0x7f7f0000U ? special : up);
}

#undef SK_HASH
