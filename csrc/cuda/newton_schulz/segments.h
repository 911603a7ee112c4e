// Segments of an iteration on chip: what lies between two restarts; the standard form is one
// segment a step. They are planned on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace spectral_kernels::cuda {

constexpr int kMostSegmentSteps = 16;

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
  float most = 0;  // no |element| of the X behind it is larger
};

// What an iteration is: rows of coefficients a, b, c and the steps before which X is formed anew.
// False if some row lets the numbers grow out of fp16's range.
struct Rows {
  double a, b, c;
};
bool plan_segments(const std::vector<Rows>& rows, const std::vector<int64_t>& restarts, bool f16,
                   bool schatten8, double norm_factor, double eps, std::vector<Segment>& out);

}  // namespace spectral_kernels::cuda
