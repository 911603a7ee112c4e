#include "workspace.h"

#include <algorithm>
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
bool poison = false;

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

Workspace::Workspace(size_t bytes) {
  if (bytes == 0) return;
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
void poison_workspace(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  poison = on;
}

}  // namespace spectral_kernels::cpu
