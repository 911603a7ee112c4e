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
// What it cannot find: memory fences, bank conflicts, speed.
//
// A failure ends the launch with a std::runtime_error; an access outside shared memory is a
// segmentation fault.
//
// set_order(0): blocks, warps and lanes in order; 1: reversed; 2 and up: random, the number is the
// seed. set_truncation(true): mma results are rounded toward zero, as tensor cores do.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

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

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Nobody else's symbols: calls need not go through the linker's tables.
#pragma GCC visibility push(hidden)
namespace emulation {

[[noreturn]] inline void die(const char* what);

// Memory that ends (rounded up to 16 bytes) at an unreadable page and begins after one; all NaN.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : size_((bytes + 15) / 16 * 16) {
    pages_ = (size_ + kPage - 1) / kPage * kPage;
    map_ = static_cast<char*>(
        mmap(nullptr, pages_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) die("no memory");
    if (pages_ != 0 && mprotect(map_ + kPage, pages_, PROT_READ | PROT_WRITE) != 0)
      die("no memory");
    memset(map_ + kPage, 0xFF, pages_);
  }
  ~Guarded() { munmap(map_, pages_ + 2 * kPage); }
  Guarded(const Guarded&) = delete;
  char* data() const { return map_ + kPage + pages_ - size_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_, pages_ = 0;
  char* map_ = nullptr;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct PendingCopy {
  char* to;
  unsigned group;
  char bytes[16];
};

constexpr size_t kStackBytes = 1 << 16;

// The compiler's own, without signals and what else that of the C library looks after.
using Place = void* [5];

struct Fiber {
  ucontext_t start;
  Place resume_at;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;  // started: it can be resumed, for one body after another
  dim3 thread;
  unsigned index = 0, collectives = 0;
  const Barrier* waits_at = nullptr;  // until its generation is another one
  unsigned generation = 0;
  std::vector<PendingCopy> copies;  // oldest first
  unsigned groups = 0;              // of copies that are complete; the next one is open
};

// What the lanes of a warp hand to each other; two buffers, so that one barrier a collective is
// enough.
using Words = uint32_t[32][10];
struct Exchange {
  Words words[2];
};

struct Block {
  dim3 index;
  int alive = 0;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  std::vector<Exchange> exchanges;
  std::vector<Fiber> fibers;
  std::unique_ptr<Guarded> shared_memory;
};

inline Place scheduler;
inline Fiber* current = nullptr;
inline Block* block = nullptr;  // of `current`
inline int threads = 0;
inline long progress = 0;  // counts what others may have waited for
inline std::vector<std::unique_ptr<Block>> blocks;
inline dim3 block_size, grid_size;
inline std::function<void()>* body = nullptr;
inline int order = 0;
inline std::string failure;
inline bool truncation = false;
inline int residents = 1;
inline std::mt19937 generator(0);

// Jumps are functions of their own: the compiler cannot have both ends of one in one function.
[[noreturn, gnu::noinline]] inline void jump(Place& to) { __builtin_longjmp(to, 1); }
// It does not see that others run, and change what they like, until a jump comes back.
inline void others_have_run() { asm volatile("" ::: "memory"); }

// Ends the launch with an exception, from whichever thread it is called.
inline void die(const char* what) {
  char text[256];
  const dim3 index = block == nullptr ? dim3(0, 0, 0) : block->index;
  snprintf(text, sizeof(text), "emulation: %s (block %u,%u,%u thread %u)", what, index.x, index.y,
           index.z, current == nullptr ? 0 : current->index);
  failure = text;
  if (current == nullptr) throw std::runtime_error(failure);
  current->started = false;  // what it was about is not gone on with
  jump(scheduler);
}

[[gnu::noinline]] inline void yield() {
  if (__builtin_setjmp(current->resume_at) == 0) jump(scheduler);
  others_have_run();
}

// The last to arrive does what is to be done once for all.
template <class Once>
void wait(Barrier& barrier, int count, Once once) {
  if (++barrier.arrived >= count) {
    once();
    barrier.arrived = 0;
    ++barrier.generation;
    ++progress;
    return;
  }
  current->waits_at = &barrier;
  current->generation = barrier.generation;
  yield();
  current->waits_at = nullptr;
}

inline bool waits(const Fiber& fiber) {
  return fiber.waits_at != nullptr && fiber.waits_at->generation == fiber.generation;
}

inline unsigned lane() { return current->index & 31; }

template <class Once>
void wait_for_warp(Once once) {
  const int warp = int(current->index / 32);
  wait(block->warp_barriers[size_t(warp)], std::min(32, threads - warp * 32), once);
}
inline void wait_for_warp() {
  wait_for_warp([] {});
}

inline Words& exchange() {
  return block->exchanges[current->index / 32].words[current->collectives++ & 1];
}

inline void run_threads() {
  for (;;) {
    (*body)();
    if (!current->copies.empty()) die("a cp.async was never waited for");
    current->finished = true;
    --block->alive;
    ++progress;
    yield();
  }
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  current = &fiber;
  if (__builtin_setjmp(scheduler) != 0) return others_have_run();
  if (fiber.started) jump(fiber.resume_at);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void resume_checked(Fiber& fiber) {
  resume(fiber);
  current = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

template <class T>
void arrange(std::vector<T>& items) {
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order > 1) std::shuffle(items.begin(), items.end(), generator);
}

inline void arrange_numbers(std::vector<int>& out, int count) {
  out.resize(size_t(count));
  std::iota(out.begin(), out.end(), 0);
  arrange(out);
}

inline void start_threads() {
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = block->fibers[size_t(i)];
    const unsigned t = unsigned(i);
    // One that has not ended is left where a launch has failed.
    fiber.started = fiber.started && fiber.finished;
    fiber.finished = false;
    fiber.collectives = fiber.groups = 0;
    fiber.waits_at = nullptr;
    fiber.copies.clear();
    fiber.index = t;
    fiber.thread =
        dim3(t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y));
    if (fiber.started) continue;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_threads, 0);
  }
}

inline void start_block(const dim3& index, size_t bytes) {
  const int warp_count = (threads + 31) / 32;
  block->index = index;
  block->alive = threads;
  block->barrier = Barrier{};
  block->warp_barriers.assign(size_t(warp_count), Barrier{});
  block->exchanges.resize(size_t(warp_count));
  if (int(block->fibers.size()) < threads) {
    block->fibers = std::vector<Fiber>(size_t(threads));
    for (Fiber& fiber : block->fibers) fiber.stack = std::make_unique<char[]>(kStackBytes);
  }
  if (block->shared_memory == nullptr || block->shared_memory->size() != bytes)
    block->shared_memory = std::make_unique<Guarded>(bytes);
  memset(block->shared_memory->data(), 0xFF, bytes);
  start_threads();
}

// Every warp of the block, as far as it can go: a missing barrier shows.
inline void run_block() {
  static std::vector<int> warps, lanes;
  arrange_numbers(warps, (threads + 31) / 32);
  for (const int warp : warps) {
    long last;
    do {
      last = progress;
      arrange_numbers(lanes, 32);
      for (const int l : lanes) {
        const int t = warp * 32 + l;
        if (t >= threads) continue;
        Fiber& fiber = block->fibers[size_t(t)];
        if (!fiber.finished && !waits(fiber)) resume_checked(fiber);
      }
    } while (last != progress);
  }
}

inline long launches = 0;

template <class F>
void launch(dim3 grid, dim3 block_, size_t bytes, F kernel) {
  launches++;
  grid_size = grid;
  block_size = block_;
  threads = int(block_.x * block_.y * block_.z);
  if (threads > 1024) die("more than 1024 threads a block");
  failure.clear();
  std::function<void()> run = kernel;
  body = &run;
  std::vector<dim3> waiting;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) waiting.push_back(dim3(x, y, z));
  arrange(waiting);
  while (int(blocks.size()) < residents) blocks.push_back(std::make_unique<Block>());
  std::vector<Block*> free, working;
  for (int i = 0; i < residents; i++) free.push_back(blocks[size_t(i)].get());
  for (auto next = waiting.begin(); next != waiting.end() || !working.empty();) {
    for (; next != waiting.end() && !free.empty(); ++next) {
      working.push_back(block = free.back());
      free.pop_back();
      start_block(*next, (bytes + 127) / 128 * 128);
    }
    const long before = progress;
    arrange(working);
    for (Block* at_work : working) {
      block = at_work;
      run_block();
    }
    if (before == progress) die("deadlock: not all threads reach a barrier, or a wait never ends");
    const auto done = std::stable_partition(working.begin(), working.end(),
                                            [](const Block* b) { return b->alive > 0; });
    free.insert(free.end(), done, working.end());
    working.erase(done, working.end());
  }
  current = nullptr;
  block = nullptr;
}

template <class T>
T shuffle(T value, unsigned source) {
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
  each([](uint32_t& word, double sum) {
    float rounded = float(sum);
    if (truncation && fabs(double(rounded)) > fabs(sum)) rounded = nextafterf(rounded, 0.f);
    word = to_bits(rounded);
  });
}

template <float (*kValue)(uint32_t)>
void multiply(float d[4], const uint32_t a[4], const uint32_t b[2]) {
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

inline void load(uint32_t r[4], const void* row, bool transposed) {
  auto& words = exchange();
  const unsigned l = lane();
  check_shared(row, 16, 16);
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
inline void barrier(const char* file, int line) {
  if (line == left_out_line) {
    const std::string place = std::string(file) + ":" + std::to_string(line);
    const size_t size = left_out.size();
    if (place.size() >= size && place.compare(place.size() - size, size, left_out) == 0) return;
  }
  wait(block->barrier, block->alive, [] {});
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
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define BARRIER(threads) emulation::barrier(__FILE__, __LINE__)
inline void __threadfence() {}
inline void __syncwarp() { emulation::wait_for_warp(); }
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
  const T old = *p;
  *p = old + value;
  ++emulation::progress;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
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
  emulation::check_shared(to, 16, 16);
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)
    emulation::die("a cp.async source is misaligned");
  emulation::PendingCopy copy{static_cast<char*>(to), emulation::current->groups, {}};
  if (valid) memcpy(copy.bytes, from, 16);
  memset(to, 0xFF, 16);
  emulation::current->copies.push_back(copy);
}
inline void copy_async_commit() { emulation::current->groups++; }
template <int N>
void copy_async_wait() {
  auto& copies = emulation::current->copies;
  auto next = copies.begin();
  for (; next != copies.end() && next->group + N < emulation::current->groups; ++next)
    memcpy(next->to, next->bytes, 16);
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
inline int own_thread() { return int(emulation::current->index); }
inline void wait_for(const uint32_t* p, uint32_t least) {
  if (emulation::left_out == "wait_for") return;
  while (*p < least) emulation::yield();
}
inline float rounded_product(float a, float b) { return a * b; }
inline uint32_t bits_of(float x) { return emulation::to_bits(x); }
inline float float_of(uint32_t u) { return emulation::from_bits(u); }

}  // namespace spectral_kernels::cuda
