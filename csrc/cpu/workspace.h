// Scratch memory that outlives a call. A fresh allocation of some megabytes costs a page fault per
// 4 KiB, which is measurable beside a product; so blocks are kept and lent again.
//
// Temporary memory of a call beyond its results is at most twice its largest matrix in torch's own
// memory (as a rule none) and, for every thread, the packed copies of the one matrix it works on.
// With x for a packed m x n matrix and s for a packed square of its shorter side these are
//     gram                       x
//     newton_schulz, muon_step_  4 x + 5 s, in 16 bits another s; muon_step_ also copies of the
//                                parameter and its momentum
//     inverse_root               11 s and three n x 8 probes
// at most, whatever the length of a batch or list (tests/test_workspace.py). The eigen route of
// inverse_root adds a packed square in fp64 and an eigendecomposition; eigenbasis, and with it the
// first step of SOAP and DeVA, takes two squares in fp64 and one. That is five and a half packed
// squares in fp64 and 384 rows of one where our own kernels do it (eigen/eigen.cpp), else four in
// torch's memory, which LAPACK works on.
// Elements have the size that products are computed in: 8 bytes, 4, or 2 for x where there are bf16
// instructions. A row of a panel is up to 31 elements longer than that of the matrix. A block is
// rounded up to pages, of 2 MiB if it is larger than that. Beside it a thread keeps the scratch
// memory of one job of a product: 147 KB, with tiles 1 MB (product.cpp).
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
  class Reserve* reserve_ = nullptr;  // that it stands in
};

// All that the Workspaces of one thread need at one time, lent before anything is written: a list
// step whose memory runs out has to do so before its first matrix.
class Reserve {
 public:
  explicit Reserve(size_t bytes) : block_(bytes), size_(bytes) {
    if (bytes > 0) data_ = static_cast<char*>(block_.take(bytes));
  }

  // Workspaces of this thread stand in `reserve` as far as they fit, last in, first out.
  class Use {
   public:
    explicit Use(Reserve& reserve);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Reserve* before_;
  };

 private:
  friend class Workspace;
  Workspace block_;
  char* data_ = nullptr;
  size_t size_, used_ = 0;
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
// For tests: the first `count` requests for memory are granted and the next one fails, once;
// negative: none fails. Returns what was left of the count before, negative once one has failed.
int64_t fail_workspace(int64_t count);
// Whether a request that is made now is to fail.
bool workspace_fails();

}  // namespace spectral_kernels::cpu
