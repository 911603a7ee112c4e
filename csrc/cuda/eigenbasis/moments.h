// Element-wise passes of the steps that keep their moments in an eigenbasis, and the pass that
// every such step ends with: new state and parameter, or every bit of the old ones.
#pragma once

#include <vector>

#include "../base/list_step.h"
#include "../base/matrix_list.h"

namespace spectral_kernels::cuda {

// `count` matrices of one shape; data is null where there is none.
struct MomentEntry {
  Matrices gradient;  // rotated
  Matrices moment, squares;
  Matrices new_moment, new_squares;  // workspaces of those whose bases are refreshed
  Matrices direction;                // workspace
  Matrices update;                   // the direction rotated back
  Matrices param;
  int64_t rows = 0, columns = 0, count = 0;
  int64_t first = 0;  // number of its first matrix in the whole list
  int64_t part = 0;   // and of its first partial sum
  float scale = 1;    // of the direction
};

struct Adam {
  Average first, second;  // moments
  float eps = 0;
  bool maximize = false;
};

// N = M' / (sqrt V' + eps), 0 for 0 / 0, with M' = beta1 M + (1 - beta1) G' and V' likewise of G'²;
// largest[i] <- max of itself and the bits of the largest |element| of M' and V'. These are written
// where an entry has places for them.
int launch_adam(const std::vector<MomentEntry>& entries, const Adam& adam, uint32_t* largest,
                void* stream);

struct Schedule {
  double lr = 0;
  const void* device_lr = nullptr;  // in place of lr, of type `lr_type`
  Type lr_type = Type::kF32;
  double beta1 = 0, beta2 = 0, weight_decay = 0;
  bool correct_bias = false;
  bool debias = false;      // the moments
  bool decay_last = false;  // W <- decay (W - rate U), otherwise decay W - rate U
};

// What the number t of a matrix's step says: M̂ = M / m_bias and V̂ = V / v_bias.
struct Numbers {
  float decay, rate;
  double m_bias, v_bias;
};
// `largest` becomes kRefused where a counter is bounded and it is outside 2^±50, but not 0.
int launch_numbers(const std::vector<Counter>& counters, const Schedule& schedule, Numbers* numbers,
                   uint32_t* largest, void* stream);

// Partial sums of squares of a list; also fills in where each entry's begin.
int64_t place_sums(std::vector<MomentEntry>& entries);

// inverse[i] = 1 / (rms(U) + 1e-30). `arrived` is one number a matrix, zero before and after.
int launch_inverse_rms(const std::vector<MomentEntry>& entries, double* sums, uint32_t* arrived,
                       float* inverse, void* stream);

// largest[i] becomes that of something not finite where an element of decay W - rate U, rounded to
// W's type, is not.
int launch_outlook(const std::vector<MomentEntry>& entries, const Numbers* numbers,
                   const float* inverse, uint32_t* largest, void* stream);

// M <- M' and V <- V' as launch_adam has them, and W <- decay W - rate U, rounded once, of the
// matrices that are not kept; `inverse` may be null. Absent moments and squares stay.
int launch_commit(const std::vector<MomentEntry>& entries, const Adam& adam, const Numbers* numbers,
                  const float* inverse, NonFinite nonfinite, const uint32_t* largest, void* stream);

// target <- source of the matrices that are not kept.
int launch_copy(const std::vector<Entry>& entries, NonFinite nonfinite, const uint32_t* largest,
                void* stream);

}  // namespace spectral_kernels::cuda
