#include "segments.h"

#include <algorithm>
#include <cmath>

namespace spectral_kernels::cuda {
namespace {

// The power of two that brings `bound` to [2^14, 2^15).
float scale_for(double bound) {
  const int exponent = bound > 0 ? int(std::floor(std::log2(bound))) : 0;
  return float(std::ldexp(1.0, std::min(std::max(14 - exponent, -14), 15)));
}

// Singular values of X between 0 and its largest: what the matrices of every step can grow to.
class Bounds {
 public:
  explicit Bounds(double largest) {
    constexpr int kPoints = 4096;
    for (int i = 0; i <= kPoints; i++) {
      const double s = largest * i / kPoints;
      r_.push_back(s * s);
      q_.push_back(1);
    }
  }
  void fresh() { std::fill(q_.begin(), q_.end(), 1.0); }
  double largest_r() const { return *std::max_element(r_.begin(), r_.end()); }

  struct Step {
    double w = 0, q = 0, t = 0, r = 0, apart = 0;
  };
  Step step(const Rows& row) {
    Step most;
    for (size_t i = 0; i < r_.size(); i++) {
      const double z = r_[i] * (row.b + r_[i] * row.c), w = row.a + z, t = r_[i] * w;
      q_[i] *= w;
      r_[i] = t * w;
      most.apart = std::max(most.apart, std::abs(z));
      most.w = std::max(most.w, std::abs(w));
      most.q = std::max(most.q, std::abs(q_[i]));
      most.t = std::max(most.t, std::abs(t));
      most.r = std::max(most.r, r_[i]);
    }
    return most;
  }

 private:
  std::vector<double> r_, q_;
};

}  // namespace

bool plan_segments(const std::vector<Rows>& rows, const std::vector<int64_t>& restarts, bool f16,
                   bool schatten8, double norm_factor, double eps, std::vector<Segment>& out) {
  constexpr double kMargin =
      1.001;  // rounding of the norm; more takes some sets out of their interval
  // The null space of R is rounding noise of 2^-23, some of it negative, and grows by a² a step.
  constexpr double kMostGrowth = 1100;
  constexpr double kMost = 1u << 24;  // beyond it the low halves are lost
  constexpr float kAgain = 8192;      // packed X of later segments: below 2^15 up to 3.9
  // What rounding in 16 bits may add to a singular value, and more.
  constexpr double kRounding = 64;
  Bounds bounds(1 / norm_factor);
  out.clear();
  for (size_t t = 0; t < rows.size();) {
    size_t end = t + 1;
    double growth = std::abs(rows[t].a);
    while (end < rows.size() && end - t < size_t(kMostSegmentSteps) &&
           growth * std::abs(rows[end].a) <= kMostGrowth &&
           std::count(restarts.begin(), restarts.end(), int64_t(end)) == 0)
      growth *= std::abs(rows[end++].a);
    Segment segment;
    segment.first = t == 0;
    segment.schatten8 = schatten8;
    segment.norm_factor = float(norm_factor);
    segment.eps = float(eps);
    segment.steps = int(end - t);
    segment.apart = segment.steps == 1;
    segment.before = out.empty() ? 1.f : out.back().after;
    segment.r_scale = scale_for(bounds.largest_r());
    bounds.fresh();
    for (; t < end; t++) {
      const Bounds::Step most = bounds.step(rows[t]);
      if (!(std::max({most.w, most.q, most.t, most.r}) < kMost)) return false;
      OnChipStep& step = segment.step[t + size_t(segment.steps) - end];
      step.a = float(rows[t].a);
      step.b = float(rows[t].b);
      step.c = float(rows[t].c);
      step.w_scale = scale_for(most.w);
      step.q_scale = scale_for(segment.apart ? most.apart : most.q);
      step.t_scale = scale_for(most.t);
      step.r_scale = scale_for(most.r);
    }
    // An X that is packed again has singular values up to sqrt(largest_r).
    const double room = std::sqrt(bounds.largest_r()) / 3;
    segment.after =
        f16 ? float(kAgain / std::exp2(std::max(0.0, std::ceil(std::log2(room))))) : 1.f;
    segment.most = float(kRounding * std::sqrt(bounds.largest_r()));
    out.push_back(segment);
  }
  return true;
}

}  // namespace spectral_kernels::cuda
