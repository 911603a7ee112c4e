// (A + delta I)^(-1/p) of symmetric matrices that fit on chip: one block a matrix, no
// synchronisation with the host.
#pragma once

#include <cstdint>
#include <vector>

#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

// One row of a schedule, N = a + b M + c M², and the scales that N, N^(2^i) and X are stored with.
struct RootStep {
  float a, b, c, x_scale, n_scale[4];
};

constexpr int kMostRootRows = 128;  // of a matrix that fits on chip
constexpr int kRootLevels = 27, kMostRootSteps = 14;

// Schedules for spectra from 2^-level to 1. A matrix takes the level just below its own lower
// bound, so no row has to be computed on the device.
struct RootSchedules {
  int p = 1;
  int steps[kRootLevels] = {};
  RootStep rows[kRootLevels][kMostRootSteps];
  uint32_t signs[32] = {};  // the fixed matrix of +-1 that residuals are taken on, n x 8 bits
};

RootSchedules root_schedules(int p);

struct RootCall {
  float ridge = 0, relative_ridge = 0;
  bool always = false;  // iterate even where the ridge does not bound the spectrum
  bool never = false;   // leave every matrix to an eigendecomposition
};

// The statuses of reference/inverse_root.py. A negative one is what launch_inverse_root leaves
// where an eigendecomposition is wanted, without or after attempts to iterate.
enum RootOutcome : int64_t {
  kRootConverged = 0,
  kRootStagnated = 1,
  kRootFellBack = 2,
  kRootRankDeficient = 3,
  kRootNonFinite = 4,
  kRootUnbounded = -1,
  kRootFailed = -2,
};

struct RootResults {
  int64_t *status, *steps;
  float *residual, *delta;
};

int64_t root_onchip_bytes(int rows);

int launch_inverse_root(const std::vector<Entry>& entries, const RootSchedules& schedules,
                        const RootCall& call, const uint32_t* largest, const RootResults& results,
                        void* stream);

}  // namespace spectral_kernels::cuda
