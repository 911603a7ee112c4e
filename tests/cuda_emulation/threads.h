// Threads, barriers and blocks of the emulation, and its launches: every CUDA thread is a fiber.
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

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

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

struct Fiber;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> members;  // that have arrived, where somebody watches
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
  int inside = 1;                   // of functions of the emulation; 0: in a kernel's own code
};

// What the lanes of a warp hand to each other; two buffers, so that one barrier a collective is
// enough.
using Words = uint32_t[32][10];
struct Exchange {
  Words words[2];
};

// What a block has of asynchronous units, see sm90.h.
struct Extra {
  virtual ~Extra() = default;
  // Does what has been put off until nobody can go on; false if there is nothing.
  virtual bool move_on() = 0;
  virtual void check_end() = 0;
};

// Is told what threads do with memory, and what puts that in order: see races.cpp.
struct Watcher {
  virtual ~Watcher() = default;
  virtual void start_launch(const void* parameters, size_t bytes) = 0;
  virtual void start_block() = 0;
  virtual void meet(const std::vector<Fiber*>& members) = 0;
  virtual void fence() = 0;
  virtual void atomic(const void* p) = 0;
  virtual void load_relaxed(const void* p) = 0;
  virtual void acquire(const void* p) = 0;
  virtual void release(const void* p) = 0;
  virtual void access(const void* p, size_t bytes, bool write, const void* code) = 0;
};

struct Block {
  dim3 index;
  int alive = 0;
  Barrier barriers[4];  // of __syncthreads, and of counted groups
  std::vector<Barrier> warp_barriers;
  std::vector<Exchange> exchanges;
  std::vector<Fiber> fibers;
  std::unique_ptr<Guarded> shared_memory;
  std::unique_ptr<Extra> extra;
  // Blocks that are at work together, this one among them; the first has the barrier of all.
  std::vector<Block*> cluster;
  Barrier cluster_barrier;
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
inline Watcher* watcher = nullptr;
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

// A barrier behind which everybody sees what each has written before it.
inline void meet(Barrier& barrier, int count) {
  if (watcher != nullptr) barrier.members.push_back(current);
  wait(barrier, count, [&] {
    if (watcher == nullptr) return;
    watcher->meet(barrier.members);
    barrier.members.clear();
  });
}

// Functions that stand for instructions: what they access of the emulation's own is nobody's.
struct Inside {
  [[gnu::no_sanitize("thread")]] Inside() { current->inside++; }
  [[gnu::no_sanitize("thread")]] ~Inside() { current->inside--; }
  Inside(const Inside&) = delete;
};

// A kernel is about to access memory.
inline void touched(const void* p, size_t bytes, bool write, const void* code) {
  if (watcher == nullptr || current == nullptr || current->inside != 0) return;
  const Inside inside;  // the watcher's templates may be those that kernels were compiled with
  watcher->access(p, bytes, write, code);
}
// The same for a function that stands for an instruction.
inline void touches(const void* p, size_t bytes, bool write) {
  if (watcher != nullptr) watcher->access(p, bytes, write, __builtin_return_address(0));
}

// Others hear at a place of what has been done before it was told there.
inline void tell(const void* p) {
  if (watcher != nullptr) watcher->release(p);
}
inline void hear(const void* p) {
  if (watcher != nullptr) watcher->acquire(p);
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

[[gnu::no_sanitize("thread")]] inline void run_threads() {
  for (;;) {
    current->inside = 0;
    (*body)();
    current->inside = 1;
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
    fiber.inside = 1;
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
  block->cluster_barrier = Barrier{};
  block->alive = threads;
  for (Barrier& barrier : block->barriers) barrier = Barrier{};
  block->extra.reset();
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
  if (watcher != nullptr) watcher->start_block();
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

// One thing of every block that was put off.
inline bool move_on(const std::vector<Block*>& working) {
  bool moved = false;
  for (Block* at_work : working) {
    block = at_work;
    if (block->extra != nullptr && block->extra->move_on()) moved = true;
  }
  return moved;
}

inline void check_end(Block* ended) {
  block = ended;
  if (block->extra != nullptr) block->extra->check_end();
  if (block->cluster_barrier.arrived != 0) die("some threads have ended at a barrier of a cluster");
  for (const Barrier& barrier : block->barriers)
    if (barrier.arrived != 0) die("some threads have ended at a barrier");
}

inline bool all_ended(const Block* first) {
  return std::all_of(first->cluster.begin(), first->cluster.end(),
                     [](const Block* b) { return b->alive == 0; });
}

// Blocks that follow one another in x are clusters of `cluster`, which are residents together.
template <class F>
void launch(dim3 grid, dim3 block_, size_t bytes, F kernel, unsigned cluster = 1) {
  launches++;
  grid_size = grid;
  block_size = block_;
  threads = int(block_.x * block_.y * block_.z);
  if (threads > 1024) die("more than 1024 threads a block");
  failure.clear();
  std::function<void()> run = std::cref(kernel);
  body = &run;
  if (watcher != nullptr) watcher->start_launch(&kernel, sizeof(kernel));
  if (grid.x % cluster != 0) die("a grid that is not of whole clusters");
  std::vector<dim3> waiting;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += cluster) waiting.push_back(dim3(x, y, z));
  arrange(waiting);
  while (blocks.size() < size_t(residents) * cluster) blocks.push_back(std::make_unique<Block>());
  std::vector<Block*> free, working;  // the first ones of clusters
  for (size_t i = 0; i < size_t(residents); i++) {
    std::vector<Block*> together;
    for (unsigned k = 0; k < cluster; k++) together.push_back(blocks[i * cluster + k].get());
    for (Block* one : together) one->cluster = together;
    free.push_back(together[0]);
  }
  for (auto next = waiting.begin(); next != waiting.end() || !working.empty();) {
    for (; next != waiting.end() && !free.empty(); ++next) {
      working.push_back(free.back());
      free.pop_back();
      for (unsigned k = 0; k < cluster; k++) {
        block = working.back()->cluster[k];
        start_block(dim3(next->x + k, next->y, next->z), (bytes + 127) / 128 * 128);
      }
    }
    const long before = progress;
    std::vector<Block*> running;
    for (const Block* first : working)
      running.insert(running.end(), first->cluster.begin(), first->cluster.end());
    arrange(running);
    for (Block* at_work : running) {
      block = at_work;
      run_block();
    }
    if (before == progress && !move_on(running))
      die("deadlock: not all threads reach a barrier, or a wait never ends");
    const auto done = std::stable_partition(working.begin(), working.end(),
                                            [](const Block* b) { return !all_ended(b); });
    for (auto ended = done; ended != working.end(); ++ended)
      std::for_each((*ended)->cluster.begin(), (*ended)->cluster.end(), check_end);
    free.insert(free.end(), done, working.end());
    working.erase(done, working.end());
  }
  current = nullptr;
  block = nullptr;
}

}  // namespace emulation
#pragma GCC visibility pop
