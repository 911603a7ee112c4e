// A list step in the eigenbases of its Kronecker factors: SOAP's and DeVA's. Matrices are worked on
// in slices, so that workspaces stay small; no bit depends on where a list is cut.
#pragma once

#include <string>
#include <vector>

#include "../../step_calls.h"
#include "../../tensor.h"
#include "../base/tensors.h"
#include "../kron_factor/products.h"
#include "moments.h"

namespace spectral_kernels::cuda {

// All but the squares, whose shape is the step's own.
void check_lists(const BasisLists& lists, const char* op);

// What exp_avg_sqs holds for every matrix.
enum class Squares : int {
  kNone,
  kMatrix,
  kLine,  // v_r and v_c
};

struct EigenbasisOptions {
  // What SOAP's and DeVA's options have in common.
  template <class Options>
  explicit EigenbasisOptions(const Options& options)
      : shampoo_beta(options.shampoo_beta),
        normalize(options.normalize_grads),
        adam{Average(options.beta1), Average(options.beta2), float(options.eps), options.maximize},
        nonfinite(options.nonfinite) {
    schedule.beta1 = options.beta1;
    schedule.beta2 = options.beta2;
    schedule.weight_decay = options.weight_decay;
  }

  Squares squares = Squares::kMatrix;
  bool new_squares = false;  // the step's own passes write V' to a workspace, and check it
  // A matrix with factors or second moments is skipped if its largest gradient is outside 2^±50:
  // sums of squares would come near to the limits of fp32.
  bool bounded = false;
  ArrayRef<double> scales;  // of the direction, one an entry; none: 1
  double shampoo_beta = 0;
  bool idle_first = false;       // a first call only sets factors and bases
  bool permute_squares = false;  // a refresh sorts columns, and the squares with them
  bool normalize = false;
  Adam adam;
  Schedule schedule;
  std::string nonfinite;
};

// Matrices that are served alike: a batch, or one of it where they differ or have no common stride.
// Tensors are undefined where there is nothing.
struct EigenbasisItem {
  size_t entry = 0;
  int64_t index = 0;  // of the matrix, if it is one of several
  int64_t number = 0, count = 0;
  bool first = false, idle = false, refresh = false;
  Tensor param, grad, moment, squares, left, right, left_basis, right_basis;
  Tensor new_left, new_right, new_left_basis, new_right_basis;
  Tensor rotated, direction, update, new_moment, new_squares;

  bool has_sides() const { return left.defined() || right.defined(); }
  // Those of this step: a first call's are new.
  bool started() const { return new_left_basis.defined() || new_right_basis.defined(); }
  const Tensor& left_rotation() const { return started() ? new_left_basis : left_basis; }
  const Tensor& right_rotation() const { return started() ? new_right_basis : right_basis; }
};

class EigenbasisStep {
 public:
  EigenbasisStep(const BasisLists& lists, const EigenbasisOptions& options, const char* op);

  // All of it, slice by slice: `pass` takes the matrices of one from G' to their directions.
  template <class F>
  void run(const F& pass) {
    if (items_.empty()) return;
    const DeviceGuard guard(lists_.params[0].device());
    begin();
    while (next_slice()) {
      rotate();
      if (!moment_entries_.empty()) pass();
      finish();
    }
    count();
  }

  // The matrices of the slice that are updated, for the step's own passes from G' to the direction.
  const std::vector<MomentEntry>& moment_entries() const { return moment_entries_; }
  std::vector<Tensor> directions() const;
  int64_t matrices() const { return largest_.numel(); }
  const Tensor& like() const { return items_[begin_].param; }

  Numbers* numbers() const { return static_cast<Numbers*>(numbers_.data_ptr()); }
  uint32_t* largest() const { return reinterpret_cast<uint32_t*>(largest_.data_ptr()); }
  void* stream() const { return stream_; }

 private:
  // First calls, numbers, and which matrices are not finite.
  void begin();
  // Takes the next matrices, and their workspaces.
  bool next_slice();
  void rotate();
  // Back out of the bases, factors, their refresh; state and parameters of what is not kept.
  void finish();
  void count();
  void find_first();
  void number();
  void look_at_idle_squares();
  void initialise();
  void place(EigenbasisItem& item, const Tensor& slab, int64_t& offset);
  void refresh();
  void keep(const Tensor& now, const Tensor& old, const EigenbasisItem& item);
  void check_kept(size_t from);

  const BasisLists& lists_;
  const EigenbasisOptions& options_;
  const char* op_;
  void* stream_ = nullptr;
  NonFinite nonfinite_;
  Tensor largest_, numbers_;
  std::vector<Counter> counters_;
  std::vector<EigenbasisItem> items_;
  size_t begin_ = 0, end_ = 0;  // the slice
  Tensor slab_;
  std::vector<MomentEntry> moment_entries_;
  std::vector<Entry> copies_;  // new state to old
};

}  // namespace spectral_kernels::cuda
