// DeVA's passes over a list: momentum and its energies, and the adaptation of a direction.
#pragma once

#include <vector>

#include "../../variance.h"
#include "../eigenbasis/moments.h"

namespace spectral_kernels::cuda {

struct Deva {
  Adam adam;
  Variance variance = Variance::kMomentum;
  bool nesterov = false, sign = false;
  bool relative = false, outside = false;  // places of eps; neither: inside the root

  bool has_energies() const { return variance != Variance::kNone; }
};

// An entry, and where its sums begin. Squares of kLowMemory are a row of m + n numbers.
struct Varied : MomentEntry {
  int64_t tile = 0;   // its first matrix's sums of tiles
  int64_t line = 0;   // its first matrix's first row
  int64_t share = 0;  // its first matrix's first share of a total
};

// A row or column: what enters V, as a norm, or its V̂ itself (kLowMemory), and the norm that is
// compared with V̂.
struct Line {
  float seen, top;
};

struct DevaBuffers {
  double* tiles = nullptr;
  Line* lines = nullptr;
  double* shares = nullptr;
  uint32_t* arrived = nullptr;  // one a matrix, zero before and after
  float* eps = nullptr;         // two a matrix: of rows and of columns
  const Numbers* numbers = nullptr;
  uint32_t* largest = nullptr;
};

// Elements of the workspaces; also fills in where each entry's begin.
struct DevaSizes {
  int64_t tiles = 0, lines = 0, shares = 0;
};
DevaSizes place_varied(std::vector<Varied>& entries);

// Norm "schatten". N = beta1 M' + (1 - beta1) G' with nesterov, else M', or its sign; energies of
// the rows and columns of M' and G'. Like the passes below it has `largest` see the new state.
int launch_moments(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                   void* stream);
// Lines, eps, and the new V of kLowMemory.
int launch_energies(const std::vector<Varied>& entries, const Deva& deva,
                    const DevaBuffers& buffers, void* stream);
// V' = EMA of r cᵀ, and the direction D <- scale Gamma o D.
int launch_adaptation(const std::vector<Varied>& entries, const Deva& deva,
                      const DevaBuffers& buffers, void* stream);

// Norm "linf". eps of the mean of V', where it is relative; then V' and D = scale Gamma o sign N.
int launch_mean(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                void* stream);
int launch_signs(const std::vector<Varied>& entries, const Deva& deva, const DevaBuffers& buffers,
                 void* stream);

}  // namespace spectral_kernels::cuda
