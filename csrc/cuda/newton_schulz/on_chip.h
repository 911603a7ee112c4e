// Newton–Schulz of lists of matrices whose short side fits on chip: three kernels a segment. The
// Gram matrix R = X Xᵀ is summed over chunks of columns, all steps of the segment run on it in
// shared memory, and X <- Q X. A segment is what lies between two restarts; the standard form is
// one segment a step.
#pragma once

#include <vector>

#include "../base/list_step.h"
#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

constexpr int kMostSegmentSteps = 16;
constexpr int64_t kChunkColumns = 2048;  // of one partial sum of the Gram matrix

// Bytes of shared memory that a short side of `rows` takes.
int64_t onchip_bytes(int rows);

// Step t: W = a I + b R + c R². Every matrix is stored times a power of two that brings its bound
// just below the largest fp16 number.
struct OnChipStep {
  float a, b, c;
  float w_scale, q_scale, t_scale, r_scale;  // W, Q, T = R W and R = T W after this step
};

struct Segment {
  int steps = 0;
  OnChipStep step[kMostSegmentSteps];
  float r_scale = 1;  // of R before the first step
  float before = 1;   // what is packed is X times this (unless first: then it is not normalised)
  float after = 1;    // and what is packed for the next segment
  bool first = false, schatten8 = false;
  bool apart = false;  // a X is added where Q is applied: W without a I, one step only
  float norm_factor = 1, eps = 0;
};

// What an iteration is: rows of coefficients a, b, c and the steps before which X is formed anew.
// False if some row lets the numbers grow out of fp16's range.
struct Rows {
  double a, b, c;
};
bool plan_segments(const std::vector<Rows>& rows, const std::vector<int64_t>& restarts, bool f16,
                   bool schatten8, double norm_factor, double eps, std::vector<Segment>& out);

// Workspaces of a list, in elements; also fills in where each entry's begin.
struct OnChipSizes {
  int64_t packed = 0, parts = 0, q = 0, matrices = 0;
};
OnChipSizes place_onchip(std::vector<Entry>& entries, int planes);

struct OnChipBuffers {
  uint16_t* packed = nullptr;
  float* parts = nullptr;
  uint16_t* q = nullptr;
  float* alpha = nullptr;  // one a matrix: Q X is this times the stored product
};

// Whether a matrix of 16-bit numbers can be iterated on where it is: in rows of aligned words of 8,
// and only by a single segment, as the next one needs a place for Q X.
bool readable_in_place(const Entry& e, bool f16, int planes, const std::vector<Segment>& segments);

// All segments of all matrices, and the update. Fills in what is `largest` of direct entries.
int launch_newton_schulz(const std::vector<Entry>& entries, const std::vector<Segment>& segments,
                         bool f16, int planes, uint32_t* largest, const OnChipBuffers& buffers,
                         const Update& update, void* stream);

}  // namespace spectral_kernels::cuda
