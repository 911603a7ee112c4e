// The update of a parameter from its polar factor where it is more than one product can add: rows
// normalised by their second moments, decay where both agree in sign, and parameters of one length.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

// With a second moment v of every row (NorMuon; absent: f = 1):
//     v <- beta2 v + (1 - beta2) mean_j O_ij²,  f = 1 / (sqrt(v) + eps)
//     U_ij = (‖O‖ / ‖diag(f) O‖) f_i O_ij
// and W <- W - decay W - rate U, with `cautious` decaying no W_ij whose sign is against U_ij's, or
// with `hyperball`, which has no decay,
//     W' = W - rate ‖W‖ U / ‖U‖,  W <- ‖W‖ W' / ‖W'‖,  with U / ‖U‖ = 0 for U = 0
struct NeuronStep {
  Matrix param, second;  // W; v, one column
  double rate = 0, decay = 0;
  bool cautious = false, hyperball = false;
  double beta2 = 0, eps = 0;
  double kept = 1;                             // of W with `hyperball`, found by run()
  Matrix o;                                    // dense rows in fp32, or fp64
  double *sums = nullptr, *factors = nullptr;  // of every row: of O_ij², and f
  double *lengths = nullptr, *dots = nullptr;  // of W_ij², and of W_ij O_ij
};

// Scratch of a step of an m x n parameter.
size_t neuron_bytes(int64_t m, int64_t n, bool fp64);
// Takes it from a workspace, and returns where O is to be written.
Matrix take_neurons(Workspace& workspace, NeuronStep& step, bool fp64);
void run(NeuronStep step, int threads);

}  // namespace spectral_kernels::cpu
