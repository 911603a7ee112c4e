#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spectral_kernels::cpu {
namespace {

struct Chunk {
  char* data;
  size_t size;
};

constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20;

std::mutex mutex;
std::vector<Chunk> idle;  // sorted by size
size_t kept = 0, lent = 0, peak = 0;
size_t limit = size_t(512) << 20;
std::atomic<bool> poison{false};
std::atomic<int64_t> grants{-1};  // before a request fails; negative: none does
thread_local Reserve* current = nullptr;

Chunk allocate(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t unit = huge ? kHugePage : kPage;
  const size_t size = (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(unit, size);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(data, size, MADV_HUGEPAGE);  // fewer TLB misses; a refusal costs nothing
#endif
  return {static_cast<char*>(data), size};
}

void trim(size_t to) {
  while (!idle.empty() && kept > to) {
    kept -= idle.back().size;
    std::free(idle.back().data);
    idle.pop_back();
  }
}

}  // namespace

Reserve::Use::Use(Reserve& reserve) : before_(current) { current = &reserve; }

Reserve::Use::~Use() { current = before_; }

Workspace::Workspace(size_t bytes) {
  if (bytes == 0) return;
  const size_t size = rounded(bytes);
  if (current != nullptr && current->used_ + size <= current->size_) {
    reserve_ = current;
    data_ = current->data_ + current->used_;
    size_ = size;
    current->used_ += size;
    if (poison) std::memset(data_, 0xff, size);
    return;
  }
  if (workspace_fails()) throw std::bad_alloc();
  std::unique_lock<std::mutex> lock(mutex);
  const auto fits =
      std::find_if(idle.begin(), idle.end(), [&](const Chunk& c) { return c.size >= bytes; });
  Chunk chunk{};
  // A block of more than four times the size is left for somebody who needs it.
  if (fits != idle.end() && fits->size / 4 <= std::max(bytes, kPage)) {
    chunk = *fits;
    idle.erase(fits);
    kept -= chunk.size;
  } else {
    lock.unlock();
    chunk = allocate(bytes);
    lock.lock();
  }
  lent += chunk.size;
  peak = std::max(peak, lent);
  const bool fill = poison;
  lock.unlock();
  if (fill) std::memset(chunk.data, 0xff, chunk.size);  // all ones is a NaN in every format
  data_ = chunk.data;
  size_ = chunk.size;
}

Workspace::~Workspace() {
  if (data_ == nullptr) return;
  if (reserve_ != nullptr) {
    reserve_->used_ -= size_;
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  lent -= size_;
  const auto place =
      std::find_if(idle.begin(), idle.end(), [&](const Chunk& c) { return c.size > size_; });
  idle.insert(place, Chunk{data_, size_});
  kept += size_;
  trim(limit);
}

void* Workspace::take(size_t bytes) {
  char* at = data_ + used_;
  used_ += rounded(bytes);
  if (used_ > size_) throw std::bad_alloc();
  return at;
}

void set_workspace_limit(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  limit = bytes;
  trim(limit);
}
size_t workspace_limit() {
  const std::lock_guard<std::mutex> lock(mutex);
  return limit;
}
size_t workspace_kept() {
  const std::lock_guard<std::mutex> lock(mutex);
  return kept;
}
size_t workspace_peak() {
  const std::lock_guard<std::mutex> lock(mutex);
  return peak;
}
void reset_workspace_peak() {
  const std::lock_guard<std::mutex> lock(mutex);
  peak = lent;
}
void release_workspace() {
  const std::lock_guard<std::mutex> lock(mutex);
  trim(0);
}
void poison_workspace(bool on) { poison = on; }

int64_t fail_workspace(int64_t count) { return grants.exchange(count); }

bool workspace_fails() { return grants.load() >= 0 && grants.fetch_sub(1) == 0; }

}  // namespace spectral_kernels::cpu
