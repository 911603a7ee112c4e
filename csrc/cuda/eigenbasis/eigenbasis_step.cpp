#include "eigenbasis_step.h"

#include <utility>

#include "../../check.h"
#include "../../check_lists.h"
#include "../base/switches.h"
#include "../base/tensors.h"
#include "../base/torch_ops.h"
#include "refresh.h"

namespace spectral_kernels::cuda {

namespace {

Tensor present(const Tensor& t) { return t.numel() == 0 ? Tensor() : t; }

Tensor transposed(const Tensor& t) { return t.defined() ? transposed_matrix(t) : t; }

int64_t padded(int64_t elements) { return (elements + 63) / 64 * 64; }

int64_t elements_of(const EigenbasisItem& item, bool new_squares) {
  int64_t each = item.param.size(-2) * item.param.size(-1);
  each *= 1 + 2 * item.has_sides() + item.refresh;
  if (item.squares.defined() && (item.refresh || new_squares))
    each += item.squares.size(-2) * item.squares.size(-1);
  for (const Tensor& factor : {item.left, item.right})
    if (factor.defined()) each += factor.size(-1) * factor.size(-1);
  return item.count * each + 7 * padded(1);
}

// A workspace of t's shape whose rows, or columns, are contiguous as t's are.
Tensor take(const Tensor& slab, int64_t& offset, const Tensor& t) {
  std::vector<int64_t> strides(size_t(t.dim()));
  const bool by_columns = t.stride(-2) < t.stride(-1);
  int64_t next = t.size(-2) * t.size(-1);
  for (size_t d = strides.size() - 2; d-- > 0;) {
    strides[d] = next;
    next *= t.size(int64_t(d));
  }
  strides[strides.size() - 2] = by_columns ? 1 : t.size(-1);
  strides[strides.size() - 1] = by_columns ? t.size(-2) : 1;
  const Tensor taken = slab.as_strided(t.sizes(), strides, offset);
  offset += padded(next);
  return taken;
}

std::vector<EigenbasisItem> single_matrices(const EigenbasisItem& item) {
  std::vector<EigenbasisItem> singles;
  for (int64_t i = 0; i < item.count; i++) {
    EigenbasisItem one = item;
    one.index = i;
    one.count = 1;
    for (Tensor* t : {&one.param, &one.grad, &one.moment, &one.squares, &one.left, &one.right,
                      &one.left_basis, &one.right_basis})
      if (t->defined()) *t = matrix_of(*t, i);
    singles.push_back(std::move(one));
  }
  return singles;
}

}  // namespace

void check_lists(const BasisLists& lists, const char* op) {
  check_step(lists);
  check_state(lists.exp_avgs, "exp_avgs", lists.params, false);
  check_eigenbasis_lists(lists);
  if (lists.params.empty()) return;
  for (const TensorList list :
       {TensorList(lists.params), TensorList(lists.grads), TensorList(lists.exp_avgs),
        TensorList(lists.exp_avg_sqs), TensorList(lists.lefts), TensorList(lists.rights),
        TensorList(lists.left_bases), TensorList(lists.right_bases)})
    for (const Tensor& t : list)
      if (t.numel() > 0) check_not_double(t, op);
}

EigenbasisStep::EigenbasisStep(const BasisLists& lists, const EigenbasisOptions& options,
                               const char* op)
    : lists_(lists), options_(options), op_(op) {
  check_one_of(options.nonfinite, "nonfinite", {"skip", "propagate", "raise"});
  nonfinite_ = options.nonfinite == "propagate" ? NonFinite::kPropagate : NonFinite::kSkip;
  for (size_t e = 0; e < lists.params.size(); e++) {
    if (lists.params[e].numel() == 0) continue;
    EigenbasisItem item;
    item.entry = e;
    item.count = leading(lists.params[e]);
    item.param = lists.params[e];
    item.grad = lists.grads[e];
    item.moment = lists.exp_avgs[e];
    if (options.squares == Squares::kMatrix) item.squares = lists.exp_avg_sqs[e];
    if (options.squares == Squares::kLine) item.squares = lists.exp_avg_sqs[e].unsqueeze(-2);
    item.left = present(lists.lefts[e]);
    item.right = present(lists.rights[e]);
    item.left_basis = present(lists.left_bases[e]);
    item.right_basis = present(lists.right_bases[e]);
    item.refresh = lists.refresh[e] != 0 && item.has_sides();
    if (common_strides({item.param, item.grad, item.moment, item.squares, item.left, item.right,
                        item.left_basis, item.right_basis})) {
      items_.push_back(std::move(item));
    } else {
      for (EigenbasisItem& one : single_matrices(item)) items_.push_back(std::move(one));
    }
  }
  if (!items_.empty()) stream_ = stream_of(items_[0].param);
}

// Bases of zeros, which no basis is, mark a matrix that has not been seen yet.
void EigenbasisStep::find_first() {
  std::vector<size_t> unknown;
  std::vector<Entry> bases;
  int64_t matrices = 0;
  for (size_t i = 0; i < items_.size(); i++) {
    const EigenbasisItem& item = items_[i];
    if (lists_.started[item.entry] || !item.has_sides()) continue;
    unknown.push_back(i);
    for (const Tensor& basis : {item.left_basis, item.right_basis})
      if (basis.defined()) {
        append(bases, basis, {}, basis, 1, false);
        bases.back().first = matrices;
      }
    matrices += item.count;
  }
  if (unknown.empty()) return;
  const Tensor largest = zeros({matrices}, items_[0].param, kInt);
  check_launch(
      launch_largest(bases, Of::kSource, reinterpret_cast<uint32_t*>(largest.data_ptr()), stream_),
      op_);
  const Tensor found = on_cpu(largest);
  const int32_t* bits = found.const_data_ptr<int32_t>();
  std::vector<EigenbasisItem> all;
  size_t next = 0;
  for (size_t i = 0; i < items_.size(); i++) {
    EigenbasisItem& item = items_[i];
    if (next == unknown.size() || unknown[next] != i) {
      all.push_back(std::move(item));
      continue;
    }
    next++;
    const int64_t count = item.count;
    bool any = false;
    for (int64_t k = 0; k < count; k++) any = any || bits[k] == 0;
    if (!any) {
      all.push_back(std::move(item));
    } else {
      std::vector<EigenbasisItem> singles =
          count == 1 ? std::vector<EigenbasisItem>{item} : single_matrices(item);
      for (int64_t k = 0; k < count; k++) {
        EigenbasisItem& one = singles[size_t(k)];
        one.first = bits[k] == 0;
        one.idle = one.first && options_.idle_first;
        if (one.first) one.refresh = false;
        all.push_back(std::move(one));
      }
    }
    bits += count;
  }
  items_ = std::move(all);
}

// Matrices of an entry that are not updated have the last of its numbers, so that one counter holds
// the others.
void EigenbasisStep::number() {
  int64_t matrices = 0;
  for (size_t i = 0; i < items_.size();) {
    const size_t entry = items_[i].entry;
    size_t end = i;
    while (end < items_.size() && items_[end].entry == entry) end++;
    const Tensor& steps = lists_.step_counts[entry];
    for (const bool idle : {false, true}) {
      const auto add = [&](const Tensor& own, int64_t first, int64_t count) {
        if (count == 0) return;
        Counter c = counter_of(own, first, count);
        if (idle) c.steps = nullptr;
        c.bounded =
            options_.bounded && (items_[i].has_sides() || options_.squares != Squares::kNone);
        counters_.push_back(c);
      };
      const int64_t begin = matrices;
      for (size_t k = i; k < end; k++) {
        EigenbasisItem& item = items_[k];
        if (item.idle != idle) continue;
        item.number = matrices;
        matrices += item.count;
        const bool whole = item.count == steps.numel();
        if (steps.numel() > 1)
          add(whole ? steps : select(reshaped(steps, {-1}), 0, item.index), item.number,
              item.count);
      }
      if (steps.numel() == 1) add(steps, begin, matrices - begin);
    }
    i = end;
  }
  const Tensor& like = items_[0].param;
  largest_ = zeros({matrices}, like, kInt);
  numbers_ = empty({matrices * int64_t(sizeof(Numbers))}, like, kByte);
}

void EigenbasisStep::begin() {
  if (options_.nonfinite == "raise") {
    std::vector<Entry> entries;
    for (size_t e = 0; e < lists_.params.size(); e++)
      append(entries, lists_.grads[e], lists_.exp_avgs[e], lists_.params[e], 1, false);
    cuda::number(entries);
    const Entry& last = entries.back();
    raise_nonfinite(entries, lists_.params, "exp_avgs",
                    zeros({last.first + last.count}, items_[0].param, kInt), op_);
    std::vector<Tensor> squares = lists_.exp_avg_sqs;
    for (Tensor& t : squares)
      if (options_.squares == Squares::kLine) t = t.unsqueeze(-2);
    if (options_.squares == Squares::kNone) squares.clear();
    raise_nonfinite(squares, "exp_avg_sqs", op_);
    raise_nonfinite(lists_.lefts, "lefts", op_);
    raise_nonfinite(lists_.rights, "rights", op_);
    raise_nonfinite(lists_.left_bases, "left_bases", op_);
    raise_nonfinite(lists_.right_bases, "right_bases", op_);
    raise_nonfinite(lists_.params, "params", op_);
  }
  find_first();
  number();
  std::vector<Entry> entries;
  for (const EigenbasisItem& item : items_) {
    append(entries, item.grad, item.moment, item.param, 1, false);
    entries.back().first = item.number;
  }
  const bool bounded = options_.bounded;
  check_launch(launch_largest(entries, bounded ? Of::kSource : Of::kBoth, largest(), stream_), op_);
  Schedule schedule = options_.schedule;
  schedule.lr_type = type_of(lists_.lr.scalar_type());
  if (!lists_.lr.is_cpu())
    schedule.device_lr = lists_.lr.const_data_ptr();
  else
    schedule.lr = number_of(lists_.lr);
  check_launch(launch_numbers(counters_, schedule, numbers(), largest(), stream_), op_);
  if (bounded) check_launch(launch_largest(entries, Of::kMomentum, largest(), stream_), op_);
  look_at_idle_squares();
  initialise();
}

// The second moments of matrices that are not updated, which no later kernel reads.
void EigenbasisStep::look_at_idle_squares() {
  std::vector<Entry> entries;
  for (const EigenbasisItem& item : items_) {
    if (!item.idle || !item.squares.defined()) continue;
    append(entries, item.squares, {}, item.squares, 1, false);
    entries.back().first = item.number;
  }
  if (!entries.empty()) check_launch(launch_largest(entries, Of::kSource, largest(), stream_), op_);
}

// The factors of first gradients that are not zero, and their eigenbases.
void EigenbasisStep::initialise() {
  std::vector<EigenbasisItem*> firsts;
  std::vector<Entry> grads;
  for (EigenbasisItem& item : items_)
    if (item.first) {
      append(grads, item.grad, {}, item.grad, 1, false);
      grads.back().first = int64_t(firsts.size());
      firsts.push_back(&item);
    }
  if (firsts.empty()) return;
  const Tensor largest = zeros({int64_t(firsts.size())}, firsts[0]->param, kInt);
  check_launch(
      launch_largest(grads, Of::kSource, reinterpret_cast<uint32_t*>(largest.data_ptr()), stream_),
      op_);
  const Tensor found = on_cpu(largest);
  std::vector<Accumulate> factors;
  const double beta = options_.shampoo_beta;
  for (size_t i = 0; i < firsts.size(); i++) {
    const uint32_t bits = uint32_t(found.const_data_ptr<int32_t>()[i]);
    if (bits == 0 || (bits >= kInfinityBits && nonfinite_ == NonFinite::kSkip)) continue;
    EigenbasisItem& item = *firsts[i];
    for (const bool rows : {true, false}) {
      const Tensor& old = rows ? item.left : item.right;
      if (!old.defined()) continue;
      Tensor& now = rows ? item.new_left : item.new_right;
      now = empty_as(old);
      factors.push_back({item.grad, rows, old, now, beta, 1 - beta});
    }
  }
  accumulate(factors, op_);
  const auto basis_of = [&](const Tensor& factor) {
    return factor.defined()
               ? viewed(converted(eigen_of(factor, op_).vectors, kFloat), factor.sizes())
               : Tensor();
  };
  for (EigenbasisItem* item : firsts) {
    item->new_left_basis = basis_of(item->new_left);
    item->new_right_basis = basis_of(item->new_right);
  }
}

void EigenbasisStep::place(EigenbasisItem& item, const Tensor& slab, int64_t& offset) {
  item.direction = take(slab, offset, item.param);
  item.rotated = item.has_sides() ? take(slab, offset, item.param) : item.grad;
  item.update = item.has_sides() ? take(slab, offset, item.param) : item.direction;
  if (item.refresh) item.new_moment = take(slab, offset, item.moment);
  if (item.squares.defined() && (item.refresh || options_.new_squares))
    item.new_squares = take(slab, offset, item.squares);
  if (item.first) return;
  if (item.left.defined()) item.new_left = take(slab, offset, item.left);
  if (item.right.defined()) item.new_right = take(slab, offset, item.right);
}

bool EigenbasisStep::next_slice() {
  const int64_t most = switches().slice_elements;
  for (size_t i = begin_; i < end_; i++) items_[i] = {};
  begin_ = end_;
  if (begin_ == items_.size()) return false;
  int64_t elements = 0, size = 0;
  for (; end_ < items_.size(); end_++) {
    const EigenbasisItem& item = items_[end_];
    if (end_ > begin_ && size + item.param.numel() > most) break;
    size += item.param.numel();
    elements += elements_of(item, options_.new_squares);
  }
  slab_ = empty({elements}, items_[begin_].param, kFloat);
  moment_entries_.clear();
  copies_.clear();
  int64_t offset = 0;
  for (size_t i = begin_; i < end_; i++) {
    EigenbasisItem& item = items_[i];
    if (item.idle) continue;
    place(item, slab_, offset);
    MomentEntry a;
    a.gradient = matrices_from(item.rotated, 0);
    a.moment = matrices_from(item.moment, 0);
    a.squares = matrices_from(item.squares, 0);
    a.new_moment = matrices_from(item.new_moment, 0);
    a.new_squares = matrices_from(item.new_squares, 0);
    a.direction = matrices_from(item.direction, 0);
    a.update = matrices_from(item.update, 0);
    a.param = matrices_from(item.param, 0);
    a.scale = options_.scales.empty() ? 1 : float(options_.scales[item.entry]);
    a.rows = item.param.size(-2);
    a.columns = item.param.size(-1);
    a.count = item.count;
    a.first = item.number;
    moment_entries_.push_back(a);
  }
  return true;
}

std::vector<Tensor> EigenbasisStep::directions() const {
  std::vector<Tensor> list;
  for (size_t i = begin_; i < end_; i++)
    if (!items_[i].idle) list.push_back(items_[i].direction);
  return list;
}

void EigenbasisStep::rotate() {
  std::vector<TwoSided> list;
  for (size_t i = begin_; i < end_; i++) {
    const EigenbasisItem& item = items_[i];
    if (item.idle || !item.has_sides()) continue;
    list.push_back(
        {item.grad, transposed(item.left_rotation()), item.right_rotation(), item.rotated});
  }
  two_sided(list, op_);
}

void EigenbasisStep::keep(const Tensor& now, const Tensor& old, const EigenbasisItem& item) {
  if (!now.defined()) return;
  append(copies_, now, {}, old, 1, false);
  copies_.back().first = item.number;
}

// What is not finite of the new state from copies_[from] on makes its matrix be kept.
void EigenbasisStep::check_kept(size_t from) {
  const std::vector<Entry> added(copies_.begin() + int64_t(from), copies_.end());
  check_launch(launch_largest(added, Of::kSource, largest(), stream_), op_);
}

void EigenbasisStep::finish() {
  std::vector<TwoSided> back;
  std::vector<Accumulate> factors;
  const double beta = options_.shampoo_beta;
  for (size_t i = begin_; i < end_; i++) {
    const EigenbasisItem& item = items_[i];
    if (!item.idle && item.has_sides())
      back.push_back(
          {item.direction, item.left_rotation(), transposed(item.right_rotation()), item.update});
    if (!item.first && item.left.defined())
      factors.push_back({item.grad, true, item.left, item.new_left, beta, 1 - beta});
    if (!item.first && item.right.defined())
      factors.push_back({item.grad, false, item.right, item.new_right, beta, 1 - beta});
    keep(item.new_left, item.left, item);
    keep(item.new_right, item.right, item);
    keep(item.new_left_basis, item.left_basis, item);
    keep(item.new_right_basis, item.right_basis, item);
  }
  two_sided(back, op_);
  accumulate(factors, op_);
  check_kept(0);
  refresh();
  for (size_t i = begin_; i < end_; i++)
    if (options_.new_squares && !items_[i].refresh)
      keep(items_[i].new_squares, items_[i].squares, items_[i]);
  if (options_.new_squares)
    for (MomentEntry& a : moment_entries_) a.squares = {};

  if (!moment_entries_.empty()) {
    Tensor sums, arrived, inverse;
    float* normalized = nullptr;
    if (options_.normalize) {
      sums = empty({place_sums(moment_entries_)}, slab_, kDouble);
      arrived = zeros(largest_.sizes(), largest_, kInt);
      inverse = empty({largest_.numel()}, slab_);
      normalized = inverse.data_ptr<float>();
      check_launch(
          launch_inverse_rms(moment_entries_, sums.data_ptr<double>(),
                             reinterpret_cast<uint32_t*>(arrived.data_ptr()), normalized, stream_),
          op_);
    }
    if (nonfinite_ == NonFinite::kSkip)
      check_launch(launch_outlook(moment_entries_, numbers(), normalized, largest(), stream_), op_);
    check_launch(launch_commit(moment_entries_, options_.adam, numbers(), normalized, nonfinite_,
                               largest(), stream_),
                 op_);
  }
  check_launch(launch_copy(copies_, nonfinite_, largest(), stream_), op_);
}

// The moments of refreshed matrices are carried over into the new bases.
void EigenbasisStep::refresh() {
  std::vector<EigenbasisItem*> chosen;
  for (size_t i = begin_; i < end_; i++)
    if (items_[i].refresh) chosen.push_back(&items_[i]);
  if (chosen.empty()) return;
  const Tensor found = on_cpu(largest_);
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(found.const_data_ptr<int32_t>());
  const auto is_kept = [&](int64_t i) {
    return nonfinite_ == NonFinite::kSkip ? bits[i] >= kInfinityBits : bits[i] == kRefused;
  };
  const size_t from = copies_.size();
  std::vector<TwoSided> back, forth;
  for (EigenbasisItem* item : chosen) {
    const Tensor plain = empty_with_strides(item->new_moment);
    back.push_back({item->new_moment, item->left_basis, transposed(item->right_basis), plain});
    for (const bool rows : {true, false}) {
      const Tensor& old = rows ? item->left_basis : item->right_basis;
      const Tensor& factor = rows ? item->new_left : item->new_right;
      Tensor& now = rows ? item->new_left_basis : item->new_right_basis;
      if (!old.defined()) continue;
      now = cloned(old);
      for (int64_t i = 0; i < item->count; i++) {
        if (is_kept(item->number + i)) continue;
        const Refreshed refreshed =
            refreshed_basis(matrix_of(old, i), matrix_of(factor, i), options_.permute_squares, op_);
        matrix_of(now, i).copy_(refreshed.basis);
        if (!options_.permute_squares) continue;
        const Tensor squares = matrix_of(item->new_squares, i);
        squares.copy_(index_select(squares, rows ? 0 : 1, refreshed.order));
      }
    }
    forth.push_back(
        {plain, transposed(item->new_left_basis), item->new_right_basis, item->new_moment});
  }
  two_sided(back, op_);
  two_sided(forth, op_);
  for (const EigenbasisItem* item : chosen) {
    keep(item->new_left_basis, item->left_basis, *item);
    keep(item->new_right_basis, item->right_basis, *item);
    keep(item->new_moment, item->moment, *item);
    keep(item->new_squares, item->squares, *item);
  }
  check_kept(from);
  for (MomentEntry& a : moment_entries_)
    if (a.new_moment.data != nullptr) a.moment = a.squares = {};
}

void EigenbasisStep::count() {
  check_launch(launch_count(counters_, nonfinite_, largest(),
                            static_cast<unsigned long long*>(lists_.skipped.data_ptr()), stream_),
               op_);
}

}  // namespace spectral_kernels::cuda
