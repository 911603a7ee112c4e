// Runs the CUDA C++ of csrc/cuda on the CPU, for tests of what it computes: every CUDA thread of a
// block is a fiber on one OS thread, and barriers, shuffles, ldmatrix, movmatrix and mma.sync are
// collectives that wait for all their members.
//
//   g++ -x c++ -include emulation.h kernel.cu
//
// What it finds: wrong indices, layouts and tails; accesses outside dynamic shared memory (guard
// pages) and reads of what nobody has written there (NaN); cp.async read before its wait;
// misaligned shared addresses; barriers that not all threads reach; a missing barrier, since one
// warp runs as far as it can before the next one does; waits that never end. Blocks run one after
// another, or several at a time (`residents`), of which each goes from barrier to barrier in turn.
// Barriers wait for as many threads as they say. What only sm_90a has is in sm90.h. Missing fences,
// and whatever else leaves the order of two accesses to chance, are found where kernels are
// compiled as races.cpp says. What it cannot find: bank conflicts, speed.
//
// A failure ends the launch with a std::runtime_error; an access outside shared memory is a
// segmentation fault.
//
// set_order(0): blocks, warps and lanes in order; 1: reversed; 2 and up: random, the number is the
// seed. set_truncation(true): mma results are rounded toward zero, as tensor cores do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define DEVICE inline
#define HOST_DEVICE inline

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#pragma GCC visibility push(hidden)
namespace emulation {

template <class T>
T shuffle(T value, unsigned source) {
  const Inside inside;
  static_assert(sizeof(T) <= 32);
  auto& words = exchange();
  memcpy(words[lane()], &value, sizeof(T));
  wait_for_warp();
  T out;
  memcpy(&out, words[source & 31], sizeof(T));
  return out;
}

inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float from_bf16(uint32_t h) { return from_bits(h << 16); }

inline float from_f16(uint32_t h) {
  const uint32_t size = h & 0x7fff, sign = (h & 0x8000) << 16, bits = (size << 13) + (112u << 23);
  if (size > 0x7c00) return from_bits(sign | 0x7fc00000);
  if (size == 0x7c00) return from_bits(sign | 0x7f800000);
  if (size >= 0x400) return from_bits(sign | bits);
  // In units of 2^-24: the leading one that is implied is subtracted again.
  const float value = from_bits(bits + (1u << 23)) - from_bits(113u << 23);
  return sign != 0 ? -value : value;
}

inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// Both round to nearest even.
inline uint32_t to_f16(float f) {
  const uint32_t u = to_bits(f), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (f != f) return 0x7fff;
  if (fabsf(f) >= 65520.f) return sign | 0x7c00;
  if (size >= 113u << 23) return sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  // The sum's last digit is 2^-24, that of the smallest numbers.
  return sign | (to_bits(fabsf(f) + .5f) - to_bits(.5f));
}
inline uint32_t to_bf16(float f) {
  const uint32_t u = to_bits(f);
  return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// D (16 x 8) += A (16 x 16) B (16 x 8), each element's products added in their order, in double,
// in which the products are exact.
inline void multiply(double d[16][8], const float a[16][16], const float b[16][8]) {
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++) {
      const double x = double(a[row][k]);
      for (int column = 0; column < 8; column++) d[row][column] += x * double(b[k][column]);
    }
}

// As an accumulator takes it.
inline float rounded_sum(double sum) {
  const float rounded = float(sum);
  return truncation && fabs(double(rounded)) > fabs(sum) ? nextafterf(rounded, 0.f) : rounded;
}

// What the lanes have left: words of D in slots 0..3, of A in 4..7, of B in 8..9.
template <float (*kValue)(uint32_t)>
void multiply(Words& words) {
  float a[16][16], b[16][8];
  double d[16][8];
  const auto each = [&](auto visit) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) visit(words[l][i], d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  };
  for (int l = 0; l < 32; l++)
    for (int k = 0; k < 2; k++) {
      for (int i = 0; i < 4; i++)
        a[l / 4 + i % 2 * 8][l % 4 * 2 + k + i / 2 * 8] =
            kValue(words[l][4 + i] >> 16 * k & 0xffff);
      for (int i = 0; i < 2; i++)
        b[l % 4 * 2 + k + i * 8][l / 4] = kValue(words[l][8 + i] >> 16 * k & 0xffff);
    }
  each([](uint32_t word, double& sum) { sum = double(from_bits(word)); });
  multiply(d, a, b);
  each([](uint32_t& word, double sum) { word = to_bits(rounded_sum(sum)); });
}

template <float (*kValue)(uint32_t)>
void multiply(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  const Inside inside;
  Words& words = exchange();
  uint32_t* own = words[lane()];
  memcpy(own, d, 16);
  memcpy(own + 4, a, 16);
  memcpy(own + 8, b, 8);
  wait_for_warp([&] { multiply<kValue>(words); });
  memcpy(d, own, 16);
}

inline void check_shared(const void* p, size_t bytes, size_t alignment) {
  const char* begin = block->shared_memory->data();
  const char* at = static_cast<const char*>(p);
  if (at < begin || at + bytes > begin + block->shared_memory->size())
    die("a shared address is out of range");
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) die("a shared address is misaligned");
}

inline void check_word(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) die("a word of global memory is misaligned");
}

inline void load(uint32_t r[4], const void* row, bool transposed) {
  const Inside inside;
  auto& words = exchange();
  const unsigned l = lane();
  check_shared(row, 16, 16);
  touches(row, 16, false);
  memcpy(words[l], &row, sizeof(row));
  wait_for_warp();
  for (unsigned i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; e++) {
      const unsigned other = (l & 3) * 2 + e, own = l >> 2;
      const uint16_t* line;
      memcpy(&line, words[i * 8 + (transposed ? other : own)], sizeof(line));
      pair[e] = line[transposed ? own : other];
    }
    memcpy(&r[i], pair, 4);
  }
  wait_for_warp();  // the rows are read above: nobody may store before
}

// The barrier at "folder/file:line" is left out, or "wait_for".
inline std::string left_out;
inline int left_out_line = 0;
inline void leave_out(const char* what) {
  left_out = what;
  const char* colon = strrchr(what, ':');
  left_out_line = colon == nullptr ? 0 : atoi(colon + 1);
}
inline bool is_left_out(const char* file, int line) {
  if (line != left_out_line) return false;
  const std::string place = std::string(file) + ":" + std::to_string(line);
  const size_t size = left_out.size();
  return place.size() >= size && place.compare(place.size() - size, size, left_out) == 0;
}
// A barrier waits for `count` threads, whether or not others have ended.
inline void barrier(int which, int count, const char* file, int line) {
  const Inside inside;
  if (!is_left_out(file, line)) meet(block->barriers[which], count);
}
inline void meet_in_warp() {
  const Inside inside;
  const int warp = int(current->index / 32);
  meet(block->warp_barriers[size_t(warp)], std::min(32, threads - warp * 32));
}
inline void fence(const char* file, int line) {
  const Inside inside;
  if (watcher != nullptr && !is_left_out(file, line)) watcher->fence();
}
// Atomics put nothing in order but with fences.
inline void atomic(const void* p) {
  if (watcher != nullptr) watcher->atomic(p);
}

inline void set_order(int value) {
  order = value;
  generator.seed(unsigned(value));
}
inline void set_truncation(bool on) { truncation = on; }

// What one block may have.
inline int64_t shared_limit = 227 * 1024;
inline int multiprocessors = 132;  // that a cost model is told

}  // namespace emulation
#pragma GCC visibility pop

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
  emulation::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); })
#define DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(emulation::block->shared_memory->data())

// Barriers know where they stand, so that a test can leave out one of them.
#define __syncthreads() emulation::barrier(0, emulation::threads, __FILE__, __LINE__)
#define BARRIER(group, threads) emulation::barrier(1 + (group), threads, __FILE__, __LINE__)
#define __threadfence() emulation::fence(__FILE__, __LINE__)
inline void __syncwarp() { emulation::meet_in_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, emulation::lane() ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::shuffle(value, unsigned(source));
}
template <class T>
T atomicAdd(T* p, T value) {
  const emulation::Inside inside;
  emulation::atomic(p);
  const T old = *p;
  *p = old + value;
  ++emulation::progress;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const emulation::Inside inside;
  emulation::atomic(p);
  const T old = *p;
  *p = std::max(old, value);
  return old;
}
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

// The functions that csrc/cuda/base/ptx.h holds for nvcc.
namespace spectral_kernels::cuda {

inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  emulation::multiply<emulation::from_bf16>(d, a, b);
}
inline void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  emulation::multiply<emulation::from_f16>(d, a, b);
}
inline void load_matrix(uint32_t r[4], const void* row) { emulation::load(r, row, false); }
inline void load_matrix_transposed(uint32_t r[4], const void* row) {
  emulation::load(r, row, true);
}
inline uint32_t transpose_matrix(uint32_t value) {
  const emulation::Inside inside;
  auto& words = emulation::exchange();
  const unsigned l = emulation::lane();
  words[l][0] = value;
  emulation::wait_for_warp();
  uint32_t out = 0;
  for (unsigned e = 0; e < 2; e++) {
    const unsigned row = (l & 3) * 2 + e, column = l >> 2;
    out |= (words[row * 4 + column / 2][0] >> 16 * (column & 1) & 0xffff) << 16 * e;
  }
  return out;
}
// The bytes arrive at the wait; until then their place holds NaN.
inline void copy_async(void* to, const void* from, bool valid) {
  const emulation::Inside inside;
  emulation::check_shared(to, 16, 16);
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)
    emulation::die("a cp.async source is misaligned");
  emulation::PendingCopy copy{static_cast<char*>(to), emulation::current->groups, {}};
  emulation::touches(to, 16, true);
  if (valid) emulation::touches(from, 16, false);
  if (valid) memcpy(copy.bytes, from, 16);
  memset(to, 0xFF, 16);
  emulation::current->copies.push_back(copy);
}
inline void copy_async_commit() {
  const emulation::Inside inside;
  emulation::current->groups++;
}
template <int N>
void copy_async_wait() {
  const emulation::Inside inside;
  auto& copies = emulation::current->copies;
  auto next = copies.begin();
  for (; next != copies.end() && next->group + N < emulation::current->groups; ++next) {
    emulation::touches(next->to, 16, true);
    memcpy(next->to, next->bytes, 16);
  }
  copies.erase(copies.begin(), next);
}
inline uint32_t pack_f16(float low, float high) {
  return emulation::to_f16(low) | emulation::to_f16(high) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return emulation::to_bf16(low) | emulation::to_bf16(high) << 16;
}
inline float2 unpack_f16(uint32_t w) {
  return {emulation::from_f16(w & 0xffff), emulation::from_f16(w >> 16)};
}
inline float2 unpack_bf16(uint32_t w) {
  return {emulation::from_bf16(w & 0xffff), emulation::from_bf16(w >> 16)};
}
template <class T>
T fresh(const T* p) {
  return *p;
}
inline uint32_t load_relaxed(const uint32_t* p) {
  const emulation::Inside inside;
  if (emulation::watcher != nullptr) emulation::watcher->load_relaxed(p);
  return *p;
}
inline uint4 load_words(const void* p) {
  const emulation::Inside inside;
  emulation::touches(p, 16, false);
  emulation::check_word(p);
  uint4 v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_words(void* p, uint4 v) {
  const emulation::Inside inside;
  emulation::touches(p, 16, true);
  emulation::check_word(p);
  memcpy(p, &v, sizeof(v));
}
inline void prefetch_line(const void*) {}
inline int own_thread() { return int(emulation::current->index); }
inline void wait_for(const uint32_t* p, uint32_t least) {
  const emulation::Inside inside;
  if (emulation::left_out == "wait_for") return;
  while (*p < least) emulation::yield();
  emulation::hear(p);
}
inline float rounded_product(float a, float b) { return a * b; }
inline uint32_t bits_of(float x) { return emulation::to_bits(x); }
inline float float_of(uint32_t u) { return emulation::from_bits(u); }

}  // namespace spectral_kernels::cuda

#include "sm90.h"
