// Which accesses to memory a launch leaves in no order: one that may see what another thread has
// written, or may not, and one that may overwrite what another still reads. Barriers, fences with
// atomics, and loads that acquire put accesses in order, as the memory model of PTX says; that
// blocks of the emulation run one after another does not.
//
// Kernels are compiled with -fsanitize=thread, whose calls end here instead of in its library.
//
// What it does not see: plain accesses to what atomics change, and the operands of wgmma, which it
// reads when the emulation pleases.
#include <dlfcn.h>

#include <array>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "threads.h"

namespace emulation {
namespace {

// How far every thread of a block has come, as far as somebody knows.
using Known = std::vector<uint32_t>;
// The same of all blocks of a launch, by their numbers.
using Clock = std::map<uint32_t, std::shared_ptr<const Known>>;
using SharedClock = std::shared_ptr<const Clock>;

SharedClock joined(const SharedClock& a, const SharedClock& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  Clock both = *a;
  bool more = false;
  for (const auto& [number, other] : *b) {
    std::shared_ptr<const Known>& own = both[number];
    if (own == other) continue;
    if (own == nullptr) {
      own = other;
    } else {
      Known largest(*own);
      for (size_t i = 0; i < largest.size(); i++) largest[i] = std::max(largest[i], (*other)[i]);
      if (largest == *own) continue;
      own = std::make_shared<const Known>(std::move(largest));
    }
    more = true;
  }
  return more ? std::make_shared<const Clock>(std::move(both)) : a;
}

// Its own accesses since it last told others of them are those of `epoch`.
struct Thread {
  uint32_t block = 0, index = 0, epoch = 1;
  SharedClock known;
  SharedClock fenced;  // what it knew, and had done, at its last fence
  SharedClock seen;    // what will be known behind its next one

  bool knows(uint32_t of_block, uint32_t of_index, uint32_t at) const {
    if (of_block == block && of_index == index) return true;
    if (known == nullptr) return false;
    const auto found = known->find(of_block);
    return found != known->end() && (*found->second)[of_index] >= at;
  }
};

struct Access {
  uint32_t block = 0, index = 0, epoch = 0;  // never, where the epoch is 0
  const void* code = nullptr;
};

// Two bytes of memory.
struct Cell {
  Access written;
  std::vector<Access> read;  // since then
};
constexpr uintptr_t kCellBytes = 2, kPageCells = 128, kPageBytes = kCellBytes * kPageCells;
using Page = std::array<Cell, kPageCells>;

class Races : public Watcher {
 public:
  void start_launch(const void* parameters, size_t bytes) override {
    parameters_ = static_cast<const char*>(parameters);
    parameter_bytes_ = bytes;
    pages_.clear();
    threads_.clear();
    atomics_.clear();
    last_page_ = nullptr;
    last_ = nullptr;
  }
  void start_block() override {
    const char* shared = block->shared_memory->data();
    const auto first = reinterpret_cast<uintptr_t>(shared) / kPageBytes;
    const auto last =
        (reinterpret_cast<uintptr_t>(shared) + block->shared_memory->size()) / kPageBytes;
    for (uintptr_t page = first; page <= last; page++) pages_.erase(page);
    for (auto at = atomics_.begin(); at != atomics_.end();)
      at = is_shared(at->first) ? atomics_.erase(at) : std::next(at);
    last_page_ = nullptr;
    last_ = nullptr;
    const uint32_t number =
        (block->index.z * grid_size.y + block->index.y) * grid_size.x + block->index.x;
    for (int i = 0; i < threads; i++) {
      Thread& own = threads_[&block->fibers[size_t(i)]];
      own = Thread{};
      own.block = number;
      own.index = uint32_t(i);
    }
  }
  void meet(const std::vector<Fiber*>& members) override {
    SharedClock all;
    for (const Fiber* one : members) all = joined(all, threads_.at(one).known);
    Clock told = all == nullptr ? Clock{} : *all;
    std::map<uint32_t, Known> own;
    for (const Fiber* one : members) {
      const Thread& thread = threads_.at(one);
      const auto [at, made] = own.try_emplace(thread.block);
      if (made) {
        const auto known = told.find(thread.block);
        at->second = known == told.end() ? Known(size_t(threads)) : *known->second;
      }
      at->second[thread.index] = thread.epoch;
    }
    for (auto& [number, known] : own)
      told[number] = std::make_shared<const Known>(std::move(known));
    const auto result = std::make_shared<const Clock>(std::move(told));
    for (const Fiber* one : members) {
      Thread& thread = threads_.at(one);
      thread.known = result;
      thread.epoch++;
    }
  }
  void fence() override {
    Thread& own = thread();
    own.known = joined(own.known, own.seen);
    own.fenced = told_by(own);
  }
  void atomic(const void* p) override {
    check(p, sizeof(uint32_t), Kind::kAtomic, nullptr);
    Thread& own = thread();
    SharedClock& at = atomics_[p];
    own.seen = joined(own.seen, at);
    at = joined(at, own.fenced);
  }
  void load_relaxed(const void* p) override {
    Thread& own = thread();
    own.seen = joined(own.seen, atomics_[p]);
  }
  void acquire(const void* p) override {
    Thread& own = thread();
    own.known = joined(own.known, atomics_[p]);
  }
  void release(const void* p) override {
    SharedClock& at = atomics_[p];
    at = joined(at, told_by(thread()));
  }
  void access(const void* p, size_t bytes, bool write, const void* code) override {
    check(p, bytes, write ? Kind::kWrite : Kind::kRead, code);
  }

 private:
  enum class Kind { kRead, kWrite, kAtomic };

  Thread& thread() {
    if (last_ != current) {
      last_ = current;
      last_thread_ = &threads_.at(current);
    }
    return *last_thread_;
  }
  // What others know when they hear of this thread now.
  SharedClock told_by(Thread& own) {
    Clock told = own.known == nullptr ? Clock{} : *own.known;
    std::shared_ptr<const Known>& of_block = told[own.block];
    Known known = of_block == nullptr ? Known(size_t(threads)) : *of_block;
    known[own.index] = own.epoch++;
    of_block = std::make_shared<const Known>(std::move(known));
    return std::make_shared<const Clock>(std::move(told));
  }

  Cell& cell(uintptr_t at) {
    const uintptr_t number = at / kPageBytes;
    if (last_page_ == nullptr || last_number_ != number) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_page_ = page.get();
      last_number_ = number;
    }
    return (*last_page_)[at % kPageBytes / kCellBytes];
  }

  void check(const void* p, size_t bytes, Kind kind, const void* code) {
    const char* at = static_cast<const char*>(p);
    // A thread's own variables, and what nobody writes.
    if (at >= current->stack.get() && at < current->stack.get() + kStackBytes) return;
    if (at >= parameters_ && at < parameters_ + parameter_bytes_) return;
    // Counters are written plainly where nobody else is at them any more.
    if (kind != Kind::kAtomic && !atomics_.empty() && atomics_.count(p) != 0) return;
    const Thread& own = thread();
    const Access now{own.block, own.index, own.epoch, code};
    const auto first = reinterpret_cast<uintptr_t>(p);
    for (uintptr_t place = first / kCellBytes * kCellBytes; place < first + bytes;
         place += kCellBytes) {
      Cell& of = cell(place);
      if (of.written.epoch != 0 && !own.knows(of.written.block, of.written.index, of.written.epoch))
        found(p, kind == Kind::kRead ? "read" : "written", now, "written", of.written);
      if (kind == Kind::kAtomic) continue;
      if (kind == Kind::kRead) {
        note(of.read, now);
        continue;
      }
      for (const Access& other : of.read)
        if (!own.knows(other.block, other.index, other.epoch))
          found(p, "written", now, "read", other);
      of.read.clear();
      of.written = now;
    }
  }
  // One reading a thread is enough, the last: others are dropped before there is need of room.
  static void note(std::vector<Access>& read, const Access& now) {
    const auto same = [](const Access& a, const Access& b) {
      return a.block == b.block && a.index == b.index;
    };
    if (!read.empty() && same(read.back(), now)) {
      read.back() = now;
      return;
    }
    if (read.size() == read.capacity() && read.size() >= 1024) {
      std::sort(read.begin(), read.end(), [](const Access& a, const Access& b) {
        return std::tie(a.block, a.index, b.epoch) < std::tie(b.block, b.index, a.epoch);
      });
      read.erase(std::unique(read.begin(), read.end(), same), read.end());
      read.reserve(2 * read.size());
    }
    read.push_back(now);
  }

  [[noreturn]] void found(const void* p, const char* what, const Access& now, const char* before,
                          const Access& other) {
    char text[200];
    snprintf(text, sizeof(text),
             "a race: %s memory is %s at %#zx, and was %s at %#zx by block %u thread %u",
             is_shared(p) ? "shared" : "global", what, offset(now.code), before, offset(other.code),
             other.block, other.index);
    die(text);
  }
  static bool is_shared(const void* p) {
    const char* shared = block->shared_memory->data();
    return p >= shared && p < shared + block->shared_memory->size();
  }
  // In the library, for addr2line.
  static size_t offset(const void* code) {
    Dl_info found;
    if (code == nullptr || dladdr(code, &found) == 0) return 0;
    return size_t(static_cast<const char*>(code) - static_cast<const char*>(found.dli_fbase));
  }

  const char* parameters_ = nullptr;
  size_t parameter_bytes_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::unordered_map<const Fiber*, Thread> threads_;
  std::unordered_map<const void*, SharedClock> atomics_;
  Page* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
  const Fiber* last_ = nullptr;
  Thread* last_thread_ = nullptr;
};

}  // namespace
}  // namespace emulation

extern "C" void watch_races(int on) {
  static emulation::Races races;
  emulation::watcher = on != 0 ? &races : nullptr;
}

// What -fsanitize=thread has the kernels call.
#define ACCESSES(size)                                               \
  void __tsan_read##size(void* p) {                                  \
    emulation::touched(p, size, false, __builtin_return_address(0)); \
  }                                                                  \
  void __tsan_write##size(void* p) {                                 \
    emulation::touched(p, size, true, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_unaligned_read##size(void* p) {                        \
    emulation::touched(p, size, false, __builtin_return_address(0)); \
  }                                                                  \
  void __tsan_unaligned_write##size(void* p) {                       \
    emulation::touched(p, size, true, __builtin_return_address(0));  \
  }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) {
  emulation::touched(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulation::touched(p, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of the guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}
#undef ACCESSES
