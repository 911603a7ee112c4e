// The update of a parameter from its polar factor where it is more than one product can add: rows
// normalised by their second moments, and decay where both agree in sign.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

// With a second moment v of every row (NorMuon; absent: f = 1):
//     v <- beta2 v + (1 - beta2) mean_j O_ij²,  f = 1 / (sqrt(v) + eps)
//     U_ij = (‖O‖ / ‖diag(f) O‖) f_i O_ij
// and W <- W - decay W - rate U, with `cautious` decaying no W_ij whose sign is against U_ij's.
struct NeuronStep {
  Matrix param, second;  // W; v, one column
  double rate = 0, decay = 0;
  bool cautious = false;
  double beta2 = 0, eps = 0;
  Matrix o;  // dense rows in fp32, or fp64
  double *sums = nullptr, *factors = nullptr;
};

// Scratch of a step of an m x n parameter.
size_t neuron_bytes(int64_t m, int64_t n, bool fp64);
// Takes it from a workspace, and returns where O is to be written.
Matrix take_neurons(Workspace& workspace, NeuronStep& step, bool fp64);
void run(const NeuronStep& step, int threads);

}  // namespace spectral_kernels::cpu
