// Scratch memory that outlives a call. A fresh allocation of some megabytes costs a page fault per
// 4 KiB, which is measurable beside a product; so blocks are kept and lent again.
//
// Temporary memory of a call beyond its results is at most twice its largest matrix in torch's own
// memory (as a rule none) and, for every thread, the packed copies of the one matrix it works on.
// With x for a packed m x n matrix and s for a packed square of its shorter side these are
//     gram                       x
//     newton_schulz, muon_step_  4 x + 5 s, in 16 bits another s
//     inverse_root               9 s and three n x 8 probes
// at most, whatever the length of a batch or list (tests/test_workspace.py). The eigen route of
// inverse_root adds a packed square in fp64, and four in torch's memory, which LAPACK works on.
// Elements have the size that products are computed in: 8 bytes, 4, or 2 for x where there are bf16
// instructions. A row of a panel is up to 31 elements longer than that of the matrix. A block is
// rounded up to pages, of 2 MiB if it is larger than that. Beside it a thread keeps one tile of
// 147 KB (product.cpp).
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
