// deva_step_ on CUDA tensors.

#include <string>
#include <vector>

#include "../../check_deva.h"
#include "../../check_lists.h"
#include "../../counters.h"
#include "../../registration.h"
#include "../base/tensors.h"
#include "../eigenbasis/eigenbasis_step.h"
#include "../newton_schulz/orthogonalize.h"
#include "passes.h"

namespace spectral_kernels::cuda {
namespace {

// Directions of one slice, from G' on.
class Directions {
 public:
  Directions(const EigenbasisStep& step, const char* op) : step_(step), op_(op) {
    for (const MomentEntry& a : step.moment_entries()) entries_.push_back({a});
    const DevaSizes sizes = place_varied(entries_);
    tiles_ = empty({sizes.tiles + sizes.shares}, step.like(), kDouble);
    floats_ = empty({2 * sizes.lines + 2 * step.matrices()}, step.like(), kFloat);
    arrived_ = zeros({step.matrices()}, step.like(), kInt);
    buffers_.tiles = tiles_.data_ptr<double>();
    buffers_.shares = buffers_.tiles + sizes.tiles;
    buffers_.lines = reinterpret_cast<Line*>(floats_.data_ptr<float>());
    buffers_.eps = floats_.data_ptr<float>() + 2 * sizes.lines;
    buffers_.arrived = reinterpret_cast<uint32_t*>(arrived_.data_ptr());
    buffers_.numbers = step.numbers();
    buffers_.largest = step.largest();
  }

  void schatten(const Deva& deva, ArrayRef<double> rows, ScalarType compute_dtype) {
    void* stream = step_.stream();
    check_launch(launch_moments(entries_, deva, buffers_, stream), op_);
    if (deva.has_energies()) check_launch(launch_energies(entries_, deva, buffers_, stream), op_);
    orthogonalize(step_.directions(), rows, compute_dtype, op_);
    check_launch(launch_adaptation(entries_, deva, buffers_, stream), op_);
  }

  void signs(const Deva& deva) {
    if (deva.relative && deva.has_energies())
      check_launch(launch_mean(entries_, deva, buffers_, step_.stream()), op_);
    check_launch(launch_signs(entries_, deva, buffers_, step_.stream()), op_);
  }

 private:
  const EigenbasisStep& step_;
  const char* op_;
  std::vector<Varied> entries_;
  Tensor tiles_, floats_, arrived_;
  DevaBuffers buffers_;
};

void deva_step_(const BasisLists& lists, const DevaOptions& options) {
  constexpr const char* kOp = "deva_step_";
  count_call(kOp, "cuda");
  check_lists(lists, kOp);
  Deva deva;
  deva.variance = check_deva(lists, options, false);
  const bool none = deva.variance == Variance::kNone;
  check_eigenbasis_distinct(lists, !none);
  deva.nesterov = options.nesterov;
  deva.sign = options.sign;
  deva.relative = options.eps_mode == "relative";
  deva.outside = options.eps_mode == "outside";
  EigenbasisOptions basis(options);
  deva.adam = basis.adam;
  basis.squares = none                                    ? Squares::kNone
                  : deva.variance == Variance::kLowMemory ? Squares::kLine
                                                          : Squares::kMatrix;
  basis.new_squares = !none;
  basis.bounded = !options.reference && deva.relative;
  basis.scales = options.scales;
  basis.idle_first = basis.permute_squares = options.public_schatten();
  basis.schedule.debias = options.debias();
  basis.schedule.correct_bias = options.correct_bias && options.public_schatten();
  basis.schedule.decay_last = options.public_schatten();
  EigenbasisStep step(lists, basis, kOp);
  step.run([&] {
    Directions directions(step, kOp);
    if (options.schatten())
      directions.schatten(deva, options.rows, options.compute_dtype);
    else
      directions.signs(deva);
  });
}

}  // namespace

SPECTRAL_KERNELS_CUDA_OPERATORS(m) {
  m.impl("deva_step_", &boxed_step<BasisLists, DevaOptions, &deva_step_>);
}

}  // namespace spectral_kernels::cuda
