// Symmetric n x n matrices, n <= 16 NB, that stay in shared memory as two halves of fp16, high and
// low, with a power of two for each so that the low halves stay normal: 22 bits, which is fp32 for
// all that matters here. One block of NB warps a matrix. A product of two matrices that commute
// takes three mma a tile (low high, high low, high high); its fp32 result lives in registers.
//
// The result of a product must be exactly symmetric. Where both mirror tiles are computed by
// themselves the rounding errors stop commuting, and grow by a factor of 30 to 240 (measured).
//
// Tiles are 16 x 16. Warp r owns the tiles in row r and columns r, r+1 .. r+NB/2 (mod NB), every
// unordered pair once; a pair at distance NB/2 belongs to the lower row and is stored twice (warps
// r and r+4 share a scheduler, so the load stays even). In memory a tile is 4 core matrices of 8 x
// 8 halves, 128 bytes each, in the order (0,0) (8,0) (0,8) (8,8): ldmatrix and the stores of
// accumulators are free of bank conflicts, and a tile's mirror is the same memory read with .trans.
#pragma once

#include "../base/ptx.h"

namespace spectral_kernels::cuda {

template <int kNB>
class OnChip {
 public:
  static constexpr int kTiles = kNB / 2 + 1;            // that a warp owns, at most
  static constexpr int kHalf = kNB % 2 ? -1 : kNB / 2;  // the distance that two rows share
  static constexpr int kMatrix = kNB * kTiles * 1024;   // bytes, both halves
  static constexpr int kThreads = kNB * 32;
  // Element (low, i) of half h of tile d: row g + 8 low, column 8 h + 2 t + i, at 4 h + 2 low + i.
  typedef float Accumulator[kTiles][8];

  const int warp, lane;

  DEVICE explicit OnChip(char* shared) : warp(threadIdx.x / 32), lane(threadIdx.x & 31) {
    // Addresses kept in registers: ptxas would compute them again for every load (8900 -> 7100
    // instructions at NB = 8). The crossed ones swap the cores (8,0) and (0,8).
#pragma unroll
    for (int i = 0; i < kNB; i++) {
      char* row = shared + wrap(warp + i) * kTiles * 1024;
      straight_[i] = row + lane * 16;
      crossed_[i] = row + ((lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1) * 16;
    }
  }

  static DEVICE int wrap(int i) { return i >= kNB ? i - kNB : i; }
  DEVICE bool owner(int d) const { return d != kHalf || warp < kNB / 2; }
  DEVICE int row(int low) const { return warp * 16 + (lane >> 2) + 8 * low; }
  DEVICE int column(int d, int h) const { return wrap(warp + d) * 16 + 8 * h + (lane & 3) * 2; }
  DEVICE bool diagonal(int d, int h, int low, int i) const {
    return d == 0 && (lane >> 2) + 8 * low == 8 * h + (lane & 3) * 2 + i;
  }

  // g(d, h, low, first, second) for every pair of neighbours in a row.
  template <class G>
  static DEVICE void each(Accumulator& acc, G g) {
#pragma unroll
    for (int d = 0; d < kTiles; d++)
#pragma unroll
      for (int i = 0; i < 8; i += 2) g(d, i / 4, i / 2 % 2, acc[d][i], acc[d][i + 1]);
  }
  static DEVICE void scale(Accumulator& acc, float by) {
    each(acc, [&](int, int, int, float& u, float& v) {
      u *= by;
      v *= by;
    });
  }
  static DEVICE void zero(Accumulator& acc) {
    each(acc, [&](int, int, int, float& u, float& v) { u = v = 0; });
  }
  DEVICE void add_to_diagonal(Accumulator& acc, float a) const {
    each(acc, [&](int d, int h, int low, float& u, float& v) {
      if (diagonal(d, h, low, 0)) u += a;
      if (diagonal(d, h, low, 1)) v += a;
    });
  }

  // acc += A B for the commuting matrices at bytes a and b of shared memory.
  DEVICE void product(Accumulator& acc, int a, int b) const {
#pragma unroll
    for (int k = 0; k < kNB; k++) {
      uint32_t x[2][4], y[2][4];
      load(x, a, 0, k, false);
#pragma unroll
      for (int d = 0; d < kTiles; d++)
        if (d != kHalf) {
          load(y, b, d, k, true);
          multiply(acc[d], x, y);
        }
    }
    if (kHalf > 0 && owner(kHalf))
#pragma unroll
      for (int k = 0; k < kNB; k++) {
        uint32_t x[2][4], y[2][4];
        load(x, a, 0, k, false);
        load(y, b, kNB / 2, k, true);
        multiply(acc[kTiles - 1], x, y);
      }
    symmetrize(acc);
  }

  // The diagonal tile becomes the mean of it and its transpose; the others exist once.
  static DEVICE void symmetrize(Accumulator& acc) {
    float mirror[8];
#pragma unroll
    for (int core = 0; core < 4; core++)
      transpose(acc[0] + 2 * (core / 2 + core % 2 * 2), mirror + 2 * core);
#pragma unroll
    for (int i = 0; i < 8; i++) acc[0][i] = .5f * (acc[0][i] + mirror[i]);
  }

  // Writes scale * acc to the matrix at byte m.
  DEVICE void store(Accumulator& acc, char* m, float scale) const {
    each(acc, [&](int d, int h, int low, float& u, float& v) {
      if (!owner(d)) return;
      const uint32_t high = pack_f16(u * scale, v * scale);
      const float2 kept = unpack_f16(high);
      const uint32_t rest = pack_f16(u * scale - kept.x, v * scale - kept.y);
      put(m + (warp * kTiles + d) * 1024 + (low + 2 * h) * 128, high, rest);
      if (d == kHalf)
        put(m + ((warp + kNB / 2) * kTiles + d) * 1024 + (h + 2 * low) * 128,
            transpose_matrix(high), transpose_matrix(rest));
    });
  }

  // The sum over the block of every thread's value, in a fixed order; `scratch` holds NB doubles,
  // which are free again after the next barrier.
  DEVICE double sum(double value, double* scratch) const {
    for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kNB; i++) value += scratch[i];
    return value;
  }

  DEVICE double trace(Accumulator& acc, double* scratch) const {
    double local = 0;
    each(acc, [&](int d, int h, int low, float& u, float& v) {
      if (diagonal(d, h, low, 0)) local += double(u);
      if (diagonal(d, h, low, 1)) local += double(v);
    });
    return sum(local, scratch);
  }

  DEVICE double sum_of_squares(Accumulator& acc, double* scratch) const {
    double local = 0;
    each(acc, [&](int d, int, int, float& u, float& v) {
      if (owner(d)) local += (d == 0 ? 1 : 2) * (double(u) * u + double(v) * v);
    });
    return sum(local, scratch);
  }

 private:
  // Both halves of tile (warp + i, warp + k) of the matrix at byte m, as an A fragment, or as the B
  // fragments of its rows 0..7 and 8..15.
  DEVICE void load(uint32_t f[2][4], int m, int i, int k, bool b) const {
    const int d = (k - i + kNB) % kNB;
    const bool mirrored = d >= kTiles;
    const char* p = (mirrored == b ? straight_ : crossed_)[mirrored ? k : i] + m +
                    (mirrored ? kNB - d : d) * 1024;
    if (mirrored) {
      load_matrix_transposed(f[0], p);
      load_matrix_transposed(f[1], p + 512);
    } else {
      load_matrix(f[0], p);
      load_matrix(f[1], p + 512);
    }
  }

  static DEVICE void multiply(float* acc, const uint32_t a[2][4], const uint32_t b[2][4]) {
#pragma unroll
    for (int term = 2; term >= 0; term--)
#pragma unroll
      for (int h = 0; h < 2; h++) mma_f16(acc + 4 * h, a[term == 2], b[term == 1] + 2 * h);
  }

  // An 8 x 8 core of fp32 accumulators, as two matrices of 16 bits.
  static DEVICE void transpose(const float* core, float* out) {
    const uint32_t u = bits_of(core[0]), v = bits_of(core[1]);
    const uint32_t low = transpose_matrix((u & 0xffff) | v << 16);
    const uint32_t high = transpose_matrix(u >> 16 | (v & 0xffff0000u));
    out[0] = float_of((low & 0xffff) | high << 16);
    out[1] = float_of(low >> 16 | (high & 0xffff0000u));
  }

  DEVICE void put(char* core, uint32_t high, uint32_t low) const {
    *reinterpret_cast<uint32_t*>(core + lane * 4) = high;
    *reinterpret_cast<uint32_t*>(core + 512 + lane * 4) = low;
  }

  char *straight_[kNB], *crossed_[kNB];
};

}  // namespace spectral_kernels::cuda
