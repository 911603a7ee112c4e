// What becomes of a parameter, and whether that fits into it. Steps look at all of a matrix before
// any of it is written.
#pragma once

#include "kernel_table.h"

namespace spectral_kernels::cuda {

// The bits of the least number that is rounded to infinity.
DEVICE uint32_t infinite_from(Type type) {
  return type == Type::kF16 ? bits_of(65520.f) : type == Type::kBF16 ? 0x7f7f8000u : kInfinityBits;
}

// kInfinityBits if x is not finite once it is rounded to a type, else 0.
DEVICE uint32_t lost_bits(Type type, float x) {
  return (bits_of(x) & 0x7fffffffu) < infinite_from(type) ? 0 : kInfinityBits;
}

// W <- decay W - rate U of an element, rounded alike wherever it is asked for.
struct Move {
  float decay = 1, rate = 0;
  DEVICE float operator()(float w, float u) const {
    return fmaf(decay, w, -rounded_product(rate, u));
  }
};

DEVICE Move move_of(const Update& update, const Entry& e) {
  const float lr = update.device_lr != nullptr ? *update.device_lr : update.lr;
  return {fmaf(-lr, update.weight_decay, 1.f), rounded_product(lr, e.scale)};
}

// Whether an element of the moved matrix may be out of range, by the largest ones of parameter and
// update. Hardly ever so: only then is the update computed twice, to be looked at first.
DEVICE bool doubtful(const Update& update, const Entry& e, int64_t matrix) {
  if (update.targets == nullptr) return false;
  const Move move = move_of(update, e);
  const float most =
      fabsf(move.decay) * float_of(update.targets[matrix]) + fabsf(move.rate) * update.most;
  return !(most < 0.5f * float_of(infinite_from(e.target.type)));
}

}  // namespace spectral_kernels::cuda
