// Newton–Schulz iterations on packed matrices, for the families that stand on them.
#pragma once

#include <string>
#include <vector>

#include "../tensor.h"
#include "product.h"
#include "tiles.h"

namespace spectral_kernels::cpu {

struct NewtonSchulz {
  struct Row {
    double a, b, c;
  };

  std::vector<Row> rows;
  std::string method;             // "standard", "gram" or "auto"
  std::vector<int64_t> restarts;  // of the Gram form: steps before which X is formed anew
  ScalarType compute_dtype;
  double eps = 0;
  bool schatten8 = false;
  double norm_factor = 1;

  NewtonSchulz(ArrayRef<double> flat_rows, const std::string& method, IntArrayRef restarts,
               ScalarType compute_dtype, double eps, const std::string& norm, double norm_factor);

  // What the iterate is multiplied in on this processor: 16-bit operands where it has instructions
  // for them, else fp32, which is at least as accurate.
  Kind kind() const;
  // Whether an s x l problem (s <= l) takes the Gram form. A pure function of the shape, the
  // options and the instruction set.
  bool gram(int64_t s, int64_t l) const;
  // Multiply-adds, to schedule by.
  double work(int64_t s, int64_t l) const;

  // Scratch of iterate() for an s x l problem, the packed input included.
  size_t workspace_bytes(int64_t s, int64_t l) const;
  // Takes the panels for X (s x l) and Xᵀ from the workspace, for the caller to fill.
  struct Input {
    Panels x, xt;
  };
  Input take_input(Workspace& workspace, int64_t s, int64_t l) const;
  // Runs all steps on a non-zero, finite X scaled by 2^shift. The result goes through `last`, whose
  // operands are filled in here and whose alpha multiplies the result.
  void iterate(Input input, int shift, Product last, Workspace& workspace, int threads) const;
};

}  // namespace spectral_kernels::cpu
