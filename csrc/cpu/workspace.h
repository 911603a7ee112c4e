// Scratch memory that outlives a call. A fresh allocation of some megabytes costs a page fault per
// 4 KiB, which is measurable beside a product; so blocks are kept and lent again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral_kernels::cpu {

class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `bytes` of it, aligned to a cache line. The sum of all takes, each rounded up by
  // rounded(), must fit into what was asked for.
  void* take(size_t bytes);
  static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Bytes that are kept for later calls at most (the rest is returned to the system), bytes kept now,
// and the most that was lent at one time since the last reset.
void set_workspace_limit(size_t bytes);
size_t workspace_limit();
size_t workspace_kept();
size_t workspace_peak();
void reset_workspace_peak();
void release_workspace();
// For tests: fill every block with NaN when it is lent, so that a read of something unwritten
// shows.
void poison_workspace(bool on);

}  // namespace spectral_kernels::cpu
