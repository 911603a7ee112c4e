// What the fused list steps share: one record per matrix of a list of (batched) parameters, the
// policy for non-finite input, step counts and the counter of skipped matrices.
#pragma once

#include <atomic>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "../check_lists.h"
#include "../tensor.h"
#include "views.h"

namespace spectral_kernels::cpu {

// Where matrix `index` of entry `entry` of the lists stands.
struct Item {
  int64_t entry, index;
};

inline std::vector<Item> items_of(TensorList params) {
  std::vector<Item> items;
  for (size_t e = 0; e < params.size(); e++) {
    if (params[e].numel() == 0) continue;
    const int64_t count = MatrixBatch(params[e]).count();
    for (int64_t i = 0; i < count; i++) items.push_back({int64_t(e), i});
  }
  return items;
}

// A state tensor that may be absent (size 0).
inline Matrix optional_matrix(const Tensor& t, int64_t index) {
  return t.numel() == 0 ? Matrix{} : MatrixBatch(t)[index];
}

enum class NonFinite { kSkip, kPropagate, kRaise };

inline NonFinite nonfinite_policy(const std::string& name) {
  check_one_of(name, "nonfinite", {"skip", "propagate", "raise"});
  return name == "skip"        ? NonFinite::kSkip
         : name == "propagate" ? NonFinite::kPropagate
                               : NonFinite::kRaise;
}

// What has been saved of the matrices of one step is put back, unless it is committed: a matrix is
// skipped, or fails, with every bit of it and its state kept.
class Undo {
 public:
  // Copies the matrices; those without data, and all if not `on`, are left out.
  Undo(std::initializer_list<Matrix> matrices, bool on);
  ~Undo();
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;

  void commit() { copies_.clear(); }
  // Scratch memory of an Undo of these.
  static size_t bytes(std::initializer_list<Matrix> matrices);

 private:
  struct Copy {
    Matrix matrix;
    char* saved;
  };
  Workspace workspace_;
  std::vector<Copy> copies_;
};

// Whether all elements are finite; a matrix without data has none.
bool all_finite(std::initializer_list<Matrix> matrices, int threads);

// nonfinite="raise": before anything is written.
void raise_nonfinite(const std::vector<Item>& items,
                     std::initializer_list<std::pair<const char*, TensorList>> lists);
// The value of a scalar tensor on the CPU.
double scalar(const Tensor& t);

// Steps and skips, gathered from many threads and written at the end.
class Progress {
 public:
  Progress(TensorList step_counts, const Tensor& skipped);
  // Steps that matrix i has taken so far.
  double step(const Item& item) const;
  void updated(const Item& item);
  void skip() { skips_.fetch_add(1, std::memory_order_relaxed); }
  // Also where a matrix has thrown: what the others did is counted.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

 private:
  TensorList counts_;
  Tensor skipped_;
  std::vector<std::atomic<bool>> updated_;
  std::atomic<int64_t> skips_{0};
};

}  // namespace spectral_kernels::cpu
