// (A + delta I)^(-1/p) of one matrix, for the operator and for the steps that stand on it.
#pragma once

#include <string>

#include "../product.h"
#include "../tiles.h"

namespace spectral_kernels::cpu {

enum class RootStatus : int { kConverged = 0, kStagnated, kFellBack, kRankDeficient, kNonFinite };

struct RootOptions {
  int p = 4;
  double ridge = 0, relative_ridge = 0;
  std::string method = "auto";  // "auto", "iteration" or "eigen"
};

struct RootResult {
  RootStatus status = RootStatus::kConverged;
  int64_t steps = 0;
  double residual = 0, delta = 0;
};

void check_root_options(const RootOptions& options);

// out = (A / divisor + delta I)^(-1/p). Where the status is kStagnated or kNonFinite, or the root
// overflows, nothing is written unless `write_failures` (NaN for non-finite input). `old`, which
// may be none and may be `out`, is a root of an earlier A: where its spectrum ended, this one's is
// tried to end. A wrong guess costs time only.
RootResult inverse_root(const Matrix& a, double divisor, const RootOptions& options,
                        const Matrix& old, const Matrix& out, bool write_failures, int threads);

// Multiply-adds of a typical call, to schedule by.
double root_work(int64_t n, int p);
// Scratch memory of inverse_root, at most.
size_t root_bytes(int64_t n, DType dtype);

}  // namespace spectral_kernels::cpu
