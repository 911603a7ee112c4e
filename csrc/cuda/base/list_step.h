// List kernels that every fused step begins and ends with.
#pragma once

#include <vector>

#include "matrix_list.h"

namespace spectral_kernels::cuda {

enum class NonFinite : int { kSkip, kPropagate };

// kAll: both, and of the target only whether it is finite; its own largest goes to `targets`.
enum class Of : int { kSource, kMomentum, kBoth, kAll };

// largest[i] <- max of itself and the bits of max |element| of matrix i: at least kInfinityBits
// where one is not finite. The maximum of integers does not depend on the order it is taken in.
int launch_largest(const std::vector<Entry>& entries, Of of, uint32_t* largest, void* stream,
                   uint32_t* targets = nullptr);

// What becomes of a result.
struct Update {
  bool in_place = false;  // target <- decay target - rate scale result; else target <- result
  bool add = false;       // target <- keep momentum + scale result, of the lower triangle
  bool look = false;      // instead, a target that would not be finite makes its matrix be kept
  float weight_decay = 0, lr = 0;
  const float* device_lr = nullptr;  // in place of lr
  NonFinite nonfinite = NonFinite::kPropagate;
  // The largest |element| of every target, and one that no result exceeds. Without them, nothing
  // is looked at before it is written.
  const uint32_t* targets = nullptr;
  float most = 0;
};

struct Prologue {
  bool nesterov = false, maximize = false;
  Average momentum;
  Update update;     // that is to come
  bool f16 = false;  // packed as fp16, otherwise bf16
  int planes = 1;    // 2: high and low fp16 halves of fp32
};

// Frobenius norms of what is packed, where they are wanted: factor[i] is 1 / max(norm_factor norm,
// eps), 0 for 0, in the packed scale. Blocks leave fp64 sums in `squares`; the last one of a matrix
// to arrive adds them in order.
struct Norms {
  double* squares = nullptr;
  uint32_t* arrived = nullptr;  // one a matrix, zero before and after
  float* factor = nullptr;
  float norm_factor = 1, eps = 0;
};

// Partial norms of the list; also fills in where each entry's begin.
int64_t place_norms(std::vector<Entry>& entries);

// M <- momentum M + (1 - momentum) G, and X = (1 - momentum) G + momentum M (nesterov) or M (X = G
// without momentum), scaled by the power of two of largest[i] and packed row by row, zero-padded to
// `line` columns. A matrix that is skipped keeps its M and is packed as zeros; one whose target has
// to be looked at keeps it until launch_momentum.
int launch_prologue(const std::vector<Entry>& entries, const Prologue& options,
                    const uint32_t* largest, uint16_t* packed, const Norms& norms, void* stream);

// M of those matrices that launch_prologue has left alone, once it is known which are kept.
int launch_momentum(const std::vector<Entry>& entries, const Prologue& options,
                    const uint32_t* largest, void* stream);

// The matrices of one parameter, and its step count: one, one a matrix, or none.
struct Counter {
  int64_t first = 0, count = 0;
  void* steps = nullptr;  // null: only skips are counted
  Type type = Type::kF32;
  bool integer = false;  // int64 instead of `type`
  bool each = false;
  bool bounded = false;  // gradients outside 2^±50 are refused
};

// Adds 1 to the step counts of what was updated (to a single one if any matrix was), and to
// `skipped` the number of matrices that were not.
int launch_count(const std::vector<Counter>& counters, NonFinite nonfinite, const uint32_t* largest,
                 unsigned long long* skipped, void* stream);

}  // namespace spectral_kernels::cuda
