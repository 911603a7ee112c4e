// One matrix of a step that works in the eigenbases of its Kronecker factors: SOAP's and DeVA's.
#pragma once

#include <memory>
#include <vector>

#include "../../tensor.h"
#include "../kron_factor.h"
#include "../list_step.h"
#include "../product.h"
#include "../tiles.h"

namespace spectral_kernels::cpu {

// The factors and bases of one matrix; an absent side has no data.
struct Sides {
  Matrix left, right, left_basis, right_basis;
};

inline size_t sides_bytes(const Sides& sides) {
  return Undo::bytes({sides.left, sides.right, sides.left_basis, sides.right_basis});
}

class EigenbasisStep {
 public:
  // Scratch for the step itself (panels of the matrix's shape in the state's precision) is counted
  // by the caller in `extra` bytes.
  EigenbasisStep(const Matrix& grad, bool negate, const Matrix& moment, const Sides& sides,
                 double beta, size_t extra, int threads);

  // False if the gradient or the moment is not finite.
  bool finite_input() const { return finite_; }
  double largest_gradient() const { return largest_; }
  // Scratch of one matrix, with that of the constructor and `extra`; `other` is what the caller
  // takes beside it between two calls, `refresh` whether bases are refreshed.
  static size_t bytes(const Matrix& grad, const Matrix& moment, const Sides& sides, size_t extra,
                      size_t other, bool refresh);
  // Whether every side that exists has a basis of zeros.
  bool uninitialised() const;

  // Reads the gradient, once for the factors and the rotation. Comes before everything below.
  void pack_gradient();
  // The first call of a matrix: factors of this gradient, and their eigenbases. Nothing happens for
  // a zero gradient. False if a factor overflows or LAPACK fails: the caller puts back what was
  // written. Without `check` the bases are NaN then.
  bool initialise(bool check);
  // G' = Q_Lᵀ G Q_R.
  Panels rotated();
  // Whether the factors can take this gradient, and the squares of G' are finite.
  bool factors_fit() const;
  bool squares_fit(const Panels& g) const;
  // Which form of U rotate_back() wants.
  bool wants_transposed() const;
  // W <- decay W - rate Q_L U Q_Rᵀ, divided by its rms (+ 1e-30) with `normalize`; U or Uᵀ packed.
  // `precision` is that of the operands: kind(), or kBF16 for a U that is no better than that.
  void move(const Panels& u, const Matrix& param, double rate, double decay, bool normalize,
            Kind precision);
  // L <- beta L + (1 - beta) G Gᵀ, R likewise.
  void accumulate();
  // New bases, the moment carried over into them. With `permute` the columns are sorted and V's
  // rows and columns with them.
  void refresh(const Matrix& v, bool permute);

  Panels take() { return take_panels(*workspace_, m_, n_, kind_); }
  Panels take_transposed() { return take_panels(*workspace_, n_, m_, kind_); }
  Kind kind() const { return kind_; }
  int threads() const { return threads_; }

 private:
  Panels packed(bool transposed, Kind kind);
  void rotate_back(const Panels& u, Product last, Kind precision);
  TwoSidedShape shape() const;
  void two_sided(const Panels& x, const Panels& x_t, bool back, Product last);

  const Matrix grad_, moment_;
  const Sides sides_;
  const bool negate_;
  const double beta_;
  const int64_t m_, n_;
  const Kind kind_, factor_kind_;
  const int threads_;
  double largest_ = 0;
  bool finite_ = true;
  std::unique_ptr<Workspace> workspace_;
  Panels g_, g_t_;  // in factor_kind_, as far as the factors need them
  Panels x_, x_t_;  // in kind_, as far as the rotation needs them
};

Sides sides_of(const Item& item, const BasisLists& lists);
// nonfinite="raise", with exp_avg_sqs as matrices.
void raise_nonfinite(const std::vector<Item>& items, const BasisLists& lists, TensorList squares);
// Multiply-adds of every matrix besides the Newton–Schulz steps, to schedule by.
std::vector<double> eigenbasis_work(const std::vector<Item>& items, const BasisLists& lists);

}  // namespace spectral_kernels::cpu
