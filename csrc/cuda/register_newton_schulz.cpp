// gram, newton_schulz and muon_step_ on CUDA tensors: workspaces, and which kernels serve what.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "../check_lists.h"
#include "../counters.h"
#include "device.h"
#include "list_step.h"
#include "newton_schulz.h"
#include "newton_schulz_products.h"
#include "orthogonalise.h"
#include "register.h"
#include "schatten8.h"
#include "step_lists.h"
#include "tensors.h"

namespace spectral_kernels::cuda {
namespace {

// Restarts of a matrix, and the planes of its square matrices, 0 on chip.
struct Route {
  std::vector<int64_t> cuts;
  int square_planes = 0;
  bool operator<(const Route& other) const {
    return std::tie(square_planes, cuts) < std::tie(other.square_planes, other.cuts);
  }
};

// How a list is iterated on, but for the restarts of its entries.
struct Plan {
  std::vector<Rows> rows;
  std::string method;
  bool full = false, f16 = false, schatten8 = false;
  int planes = 1;
  double norm_factor = 1, eps = 0;
  const char* op;

  Plan(at::ArrayRef<double> flat_rows, c10::string_view method_, at::ScalarType compute_dtype,
       double eps_, c10::string_view norm, double norm_factor_, const char* op_)
      : method(method_), norm_factor(norm_factor_), eps(eps_), op(op_) {
    TORCH_CHECK_VALUE(!flat_rows.empty() && flat_rows.size() % 3 == 0,
                      "rows must hold a, b, c for every step, got ", flat_rows.size(), " numbers");
    check_one_of(method, "method", {"auto", "standard", "gram"});
    check_one_of(std::string(norm), "norm", {"frobenius", "schatten8"});
    TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and at least 0, got ",
                      eps);
    TORCH_CHECK_VALUE(norm_factor > 0 && std::isfinite(norm_factor),
                      "norm_factor must be positive and finite, got ", norm_factor);
    TORCH_CHECK_NOT_IMPLEMENTED(
        compute_dtype == at::kFloat || compute_dtype == at::kHalf || compute_dtype == at::kBFloat16,
        op, ": the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64");
    for (size_t i = 0; i < flat_rows.size(); i += 3)
      rows.push_back({flat_rows[i], flat_rows[i + 1], flat_rows[i + 2]});
    full = compute_dtype == at::kFloat;
    f16 = compute_dtype != at::kBFloat16;
    planes = full ? 2 : 1;
    schatten8 = norm == "schatten8";
  }

  // Steps before which X is formed anew. In full precision the Gram form keeps the accuracy of the
  // standard one only with restarts.
  std::vector<int64_t> cuts(at::IntArrayRef restarts) const {
    std::vector<int64_t> steps;
    if (method == "standard" || (method == "auto" && full && restarts.empty()))
      for (size_t t = 1; t < rows.size(); t++) steps.push_back(int64_t(t));
    else
      steps.assign(restarts.begin(), restarts.end());
    return steps;
  }

  // The same for a matrix that is too large for a chip, and the planes of its square matrices.
  Route products(const Entry& e, at::IntArrayRef restarts) const {
    Route route;
    const bool gram =
        method == "gram" || (method == "auto" && e.columns >= kLeastGramRatio * e.rows);
    route.square_planes = full || gram ? 2 : 1;
    if (full || gram)
      route.cuts = cuts(restarts);
    else
      for (size_t t = 1; t < rows.size(); t++) route.cuts.push_back(int64_t(t));
    return route;
  }

  // How a matrix is served: on chip, where square_planes is 0, if it fits there.
  Route route(const Entry& e, at::IntArrayRef restarts, int64_t shared_memory) const {
    if (onchip_bytes(e.rows) <= shared_memory) return {cuts(restarts), 0};
    TORCH_CHECK_NOT_IMPLEMENTED(product_shared_bytes(planes, 128) <= shared_memory, op,
                                ": products need ", product_shared_bytes(planes, 128),
                                " bytes of shared memory, and this device has ", shared_memory);
    return products(e, restarts);
  }

  // Planning follows thousands of singular values through all steps, 80 us: a few plans are kept.
  std::vector<Segment> segments(const std::vector<int64_t>& steps) const {
    using Key = std::tuple<std::vector<double>, std::vector<int64_t>, bool, bool, double, double>;
    constexpr size_t kMostKept = 64;
    static std::mutex mutex;
    static std::map<Key, std::vector<Segment>> kept;
    std::vector<double> numbers;
    for (const Rows& row : rows) numbers.insert(numbers.end(), {row.a, row.b, row.c});
    const Key key(std::move(numbers), steps, f16, schatten8, norm_factor, eps);
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = kept.find(key); found != kept.end()) return found->second;
    std::vector<Segment> out;
    TORCH_CHECK_NOT_IMPLEMENTED(
        plan_segments(rows, steps, f16, schatten8, norm_factor, eps, out), op,
        ": these coefficients grow beyond what the CUDA C++ kernels can hold");
    if (kept.size() == kMostKept) kept.clear();
    return kept.emplace(key, std::move(out)).first->second;
  }
};

// Scratch of one call.
class Scratch {
 public:
  Scratch(const OnChipSizes& sizes, const at::Tensor& like) : like_(like), packed_(sizes.packed) {
    const int64_t packed = aligned(sizes.packed * 2), parts = aligned(sizes.parts * 4),
                  q = aligned(sizes.q * 2), alpha = aligned(sizes.matrices * 4);
    char* at = bytes(packed + parts + q + alpha);
    largest_ = at::zeros({sizes.matrices}, like.options().dtype(at::kInt));
    buffers.packed = reinterpret_cast<uint16_t*>(at);
    buffers.parts = reinterpret_cast<float*>(at += packed);
    buffers.q = reinterpret_cast<uint16_t*>(at += parts);
    buffers.alpha = reinterpret_cast<float*>(at += q);
  }

  // What products of the placed lists `plans` need beside that, one list after the other.
  ProductWorkspaces for_products(const std::vector<ProductPlan>& plans) {
    int64_t squares = 0, parts = 0, tiles = 0, queue = 0;
    for (const ProductPlan& plan : plans) {
      squares = std::max(squares, plan.tiling.squares);
      parts = std::max(parts, plan.tiling.parts);
      tiles = std::max(tiles, plan.tiling.tiles);
      if (plan.queue) queue = 1 + largest_.numel();
    }
    const int64_t next = squares == 0 ? 0 : aligned(packed_ * 2), square = aligned(squares * 2);
    char* at = bytes(next + ProductPlan::kSquares * square + parts * 4);
    ProductWorkspaces work;
    work.x = buffers.packed;
    work.next = reinterpret_cast<uint16_t*>(at);
    work.squares = reinterpret_cast<uint16_t*>(at += next);
    work.buffers.parts = reinterpret_cast<float*>(at + ProductPlan::kSquares * square);
    work.buffers.arrived = zeros(tiles + queue);
    work.buffers.queue = work.buffers.arrived + tiles;
    work.buffers.largest = largest();
    work.factor = norms.factor;
    return work;
  }

  // Norms of all entries.
  void add_norms(std::vector<Entry>& entries, const Plan& plan) {
    const int64_t partial = aligned(place_norms(entries) * 8), matrices = largest_.numel();
    char* at = bytes(partial + matrices * 4);
    norms.squares = reinterpret_cast<double*>(at);
    norms.factor = reinterpret_cast<float*>(at + partial);
    norms.arrived = zeros(matrices);
    if (plan.schatten8) return;  // follows from the plain norm
    norms.norm_factor = float(plan.norm_factor);
    norms.eps = float(plan.eps);
  }

  uint32_t* largest() const { return reinterpret_cast<uint32_t*>(largest_.data_ptr()); }
  const at::Tensor& largest_bits() const { return largest_; }

  OnChipBuffers buffers;
  Norms norms;

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  char* bytes(int64_t count) {
    kept_.push_back(at::empty({count}, like_.options().dtype(at::kByte)));
    return static_cast<char*>(kept_.back().data_ptr());
  }
  uint32_t* zeros(int64_t count) {
    kept_.push_back(at::zeros({count}, like_.options().dtype(at::kInt)));
    return reinterpret_cast<uint32_t*>(kept_.back().data_ptr());
  }

  const at::Tensor& like_;
  int64_t packed_;
  at::Tensor largest_;
  std::vector<at::Tensor> kept_;
};

// Entries by how they are served; all of them are placed, scaled and packed together.
class Lists {
 public:
  Lists(const Plan& plan, const at::Tensor& like)
      : plan_(plan), like_(like), shared_memory_(shared_memory_of(like)) {}

  void add(const at::Tensor& source, const at::Tensor& momentum, const at::Tensor& target,
           float scale, at::IntArrayRef restarts) {
    append(entries, source, momentum, target, scale);
    while (routes_.size() < entries.size())
      routes_.push_back(plan_.route(entries[routes_.size()], restarts, shared_memory_));
  }

  // Refuses what cannot be served; nothing has been written before.
  void place() {
    std::map<Route, std::vector<size_t>> groups;
    for (size_t i = 0; i < entries.size(); i++) groups[routes_[i]].push_back(i);
    for (const auto& group : groups) {
      const std::vector<Segment>& segments = segments_[group.first] =
          plan_.segments(group.first.cuts);
      for (const size_t i : group.second)
        entries[i].direct = group.first.square_planes == 0 &&
                            readable_in_place(entries[i], plan_.f16, plan_.planes, segments);
    }
    scratch.emplace(place_onchip(entries, plan_.planes), like_);
    const bool products = groups.rbegin()->first.square_planes != 0;
    if (products) scratch->add_norms(entries, plan_);
    for (const auto& group : groups) {
      const int square_planes = group.first.square_planes;
      if (square_planes == 0) {
        std::vector<Entry>& list = onchip_[group.first];
        for (const size_t i : group.second) list.push_back(entries[i]);
        continue;
      }
      for (size_t at = 0; at < group.second.size();) {
        ProductPlan part;
        part.f16 = plan_.f16;
        part.planes = plan_.planes;
        part.square_planes = square_planes;
        for (int64_t size = 0; at < group.second.size(); at++) {
          const Entry& e = entries[group.second[at]];
          size += e.count * e.rows * e.rows;
          if (!part.entries.empty() && size > kMostSquares) break;
          part.entries.push_back(e);
        }
        const int device = device_number(like_);
        if (square_planes == 1) part.wgmma = wgmma_multiprocessors(device);
        cuda::place(part, multiprocessors_of_kind(device));
        part.queue = part.wgmma == 0 && queue_preferred(part.tiling.clocks <= kMostQueueClocks);
        products_.push_back(std::move(part));
        product_routes_.push_back(group.first);
      }
    }
    if (products) workspaces_ = scratch->for_products(products_);
  }

  void iterate(const Update& update, void* stream) {
    for (const auto& list : onchip_)
      check_launch(launch_newton_schulz(list.second, segments_[list.first], plan_.f16, plan_.planes,
                                        scratch->largest(), scratch->buffers, update, stream),
                   plan_.op);
    for (size_t i = 0; i < products_.size(); i++) {
      if (plan_.schatten8)
        check_launch(launch_schatten8(products_[i], workspaces_, scratch->norms,
                                      float(plan_.norm_factor), float(plan_.eps), stream),
                     plan_.op);
      check_launch(
          launch_products(products_[i], segments_[product_routes_[i]], workspaces_, update, stream),
          plan_.op);
    }
  }

  // From sources to targets.
  void run(void* stream) {
    place();
    Prologue prologue;
    prologue.f16 = plan_.f16;
    prologue.planes = plan_.planes;
    const std::vector<Entry> list = packed();
    check_launch(launch_largest(list, Of::kSource, scratch->largest(), stream), plan_.op);
    check_launch(launch_prologue(list, prologue, scratch->largest(), scratch->buffers.packed,
                                 scratch->norms, stream),
                 plan_.op);
    iterate(Update(), stream);
  }

  // Those that the prologue packs.
  std::vector<Entry> packed() const {
    std::vector<Entry> list;
    std::copy_if(entries.begin(), entries.end(), std::back_inserter(list),
                 [](const Entry& e) { return !e.direct; });
    return list;
  }

  std::vector<Entry> entries;
  std::optional<Scratch> scratch;

 private:
  static constexpr int64_t kMostSquares = 1 << 24;  // elements that are worked on at a time
  // Of a product of a list that is iterated on in one launch. A launch that follows another costs
  // some 3 µs, to drain and to fill the device; an item that waits for others some 1, for a fence,
  // a counter and its next reader. Against these 2 µs stand the counter and the fence of every
  // item, 1900 clocks, of which 3 or 4 blocks on a multiprocessor hide all but a tenth of the time
  // of an item: equal at 20 µs. A model; no card has run it yet.
  static constexpr double kMostQueueClocks = 40000;

  const Plan& plan_;
  const at::Tensor& like_;
  int64_t shared_memory_;
  std::vector<Route> routes_;
  std::map<Route, std::vector<Segment>> segments_;
  std::map<Route, std::vector<Entry>> onchip_;
  std::vector<ProductPlan> products_;
  std::vector<Route> product_routes_;
  ProductWorkspaces workspaces_;
};

at::Tensor newton_schulz(const at::Tensor& x, at::ArrayRef<double> rows, c10::string_view method,
                         at::IntArrayRef restarts, at::ScalarType compute_dtype, double eps,
                         c10::string_view norm, double norm_factor) {
  constexpr const char* kOp = "newton_schulz";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  const c10::DeviceGuard guard(x.device());
  at::Tensor out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  check_not_double(x, kOp);
  Lists lists(plan, x);
  lists.add(x, {}, out, 1, restarts);
  lists.run(stream_of(x));
  return out;
}

// Whether products can read a 16-bit batch where it is: contiguous, in whole steps. Its products
// are then summed as they are, so that they overflow or vanish as those of torch do.
bool is_packed(const Entry& e) {
  const Matrices& m = e.source;
  return m.type != Type::kF32 && m.column == 1 && m.row == e.columns &&
         (e.count == 1 || m.batch == e.rows * e.columns) && e.columns % kPackedColumns == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

at::Tensor gram(const at::Tensor& x) {
  constexpr const char* kOp = "gram";
  count_call(kOp, "cuda");
  check_matrix(x, "x");
  check_not_double(x, kOp);
  const c10::DeviceGuard guard(x.device());
  auto sizes = x.sizes().vec();
  sizes.back() = x.size(-2);
  const at::Tensor out = at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (x.numel() == 0) return out.zero_();
  std::vector<ProductPlan> plans(1);
  ProductPlan& plan = plans[0];
  plan.f16 = x.scalar_type() != at::kBFloat16;
  plan.planes = plan.square_planes = x.scalar_type() == at::kFloat ? 2 : 1;
  const int device = device_number(x);
  if (plan.planes == 1) plan.wgmma = wgmma_multiprocessors(device);
  append(plan.entries, x, {}, out, 1, false);
  const bool direct = plan.entries.size() == 1 && is_packed(plan.entries[0]);
  plan.entries[0].direct = direct;
  Scratch scratch(place_onchip(plan.entries, plan.planes), x);
  place(plan, multiprocessors_of_kind(device));
  plan.tiling.squares = 0;  // the result goes to its place at once
  const ProductWorkspaces work = scratch.for_products(plans);
  void* stream = stream_of(x);
  Product product;
  product.shape = Shape::kGram;
  product.format = {plan.planes, plan.f16};
  if (direct) {
    product.a = product.b = static_cast<const uint16_t*>(x.const_data_ptr());
  } else {
    Prologue prologue;
    prologue.f16 = plan.f16;
    prologue.planes = plan.planes;
    check_launch(launch_largest(plan.entries, Of::kSource, scratch.largest(), stream), kOp);
    check_launch(launch_prologue(plan.entries, prologue, scratch.largest(), scratch.buffers.packed,
                                 scratch.norms, stream),
                 kOp);
    product.a = product.b = work.x;
    product.unshift = 2;
    product.x_f16 = plan.f16;
  }
  check_launch(launch_product(plan, product, work.buffers, stream), kOp);
  if (direct) check_launch(launch_spread_nonfinite(plan.entries, stream), kOp);
  return out;
}

void muon_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                at::TensorList second_moments, at::TensorList step_counts,
                const at::Tensor& skipped, const at::Tensor& lr, double momentum, bool nesterov,
                std::optional<double> beta2, double /*neuron_eps*/, double weight_decay,
                bool cautious, at::ArrayRef<double> rows, at::ArrayRef<double> scales,
                c10::string_view method, at::IntArrayRef restarts, at::IntArrayRef restart_ends,
                at::ScalarType compute_dtype, double eps, c10::string_view norm, double norm_factor,
                bool maximize, c10::string_view nonfinite) {
  constexpr const char* kOp = "muon_step_";
  count_call(kOp, "cuda");
  check_step(params, grads, step_counts, skipped, lr);
  check_state(momentum_buffers, "momentum_buffers", params, false);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !beta2.has_value() && !cautious, kOp,
      ": the CUDA C++ kernels have no second moments of neurons and no cautious weight decay");
  check_rows_state(second_moments, "second_moments", params, false);
  check_distinct({params, momentum_buffers}, grads);
  TORCH_CHECK_VALUE(scales.size() == params.size(), "scales has ", scales.size(),
                    " entries, params has ", params.size());
  const std::string policy(nonfinite);
  check_one_of(policy, "nonfinite", {"skip", "propagate", "raise"});
  const Plan plan(rows, method, compute_dtype, eps, norm, norm_factor, kOp);
  check_restart_ends(restarts, restart_ends, params.size());
  if (params.empty()) return;
  const c10::DeviceGuard guard(params[0].device());
  Lists lists(plan, params[0]);
  std::vector<Counter> counters;
  int64_t matrices = 0;
  for (size_t i = 0; i < params.size(); i++) {
    if (params[i].numel() == 0) continue;
    counters.push_back(counter_of(step_counts[i], matrices, leading(params[i])));
    matrices += leading(params[i]);
    check_not_double(params[i], kOp);
    const int64_t begin = i == 0 || restart_ends.empty() ? 0 : restart_ends[i - 1];
    const int64_t end = restart_ends.empty() ? 0 : restart_ends[i];
    lists.add(grads[i], momentum_buffers[i], params[i], float(scales[i]),
              restarts.slice(size_t(begin), size_t(end - begin)));
  }
  if (lists.entries.empty()) return;
  lists.place();
  Scratch& scratch = *lists.scratch;
  void* stream = stream_of(params[0]);

  Prologue prologue;
  prologue.nesterov = nesterov;
  prologue.maximize = maximize;
  prologue.momentum = Average(momentum);
  prologue.nonfinite = policy == "skip" ? NonFinite::kSkip : NonFinite::kPropagate;
  prologue.f16 = plan.f16;
  prologue.planes = plan.planes;
  Update update;
  update.in_place = true;
  update.weight_decay = float(weight_decay);
  update.nonfinite = prologue.nonfinite;
  at::Tensor rate;  // kept alive until the kernels are launched
  if (lr.is_cpu()) {
    update.lr = lr.scalar_type() == at::kFloat ? *lr.const_data_ptr<float>()
                                               : float(*lr.const_data_ptr<double>());
  } else {
    rate = lr.to(at::kFloat);
    update.device_lr = rate.const_data_ptr<float>();
  }

  if (policy == "raise") {
    raise_nonfinite(lists.entries, params, "momentum_buffers", scratch.largest_bits(), kOp);
    raise_nonfinite(params, "params", kOp);
  } else {
    const Of of = policy == "skip" ? Of::kAll : Of::kBoth;
    check_launch(launch_largest(lists.entries, of, scratch.largest(), stream), kOp);
    if (rate.defined() && policy == "skip")
      scratch.largest_bits().masked_fill_(at::isfinite(rate.view({})).logical_not(),
                                          int32_t(kRefused));
  }
  check_launch(launch_prologue(lists.entries, prologue, scratch.largest(), scratch.buffers.packed,
                               scratch.norms, stream),
               kOp);
  lists.iterate(update, stream);
  check_launch(launch_count(counters, update.nonfinite, scratch.largest(),
                            static_cast<unsigned long long*>(skipped.data_ptr()), stream),
               kOp);
}

}  // namespace

void orthogonalise(const std::vector<at::Tensor>& list, at::ArrayRef<double> rows,
                   at::ScalarType compute_dtype, const char* op) {
  if (list.empty()) return;
  const Plan plan(rows, "auto", compute_dtype, 0, "schatten8", 1, op);
  Lists lists(plan, list[0]);
  for (const at::Tensor& x : list) lists.add(x, {}, x, 1, {});
  lists.run(stream_of(list[0]));
}

void register_newton_schulz(torch::Library& m) {
  m.impl("gram", &gram);
  m.impl("newton_schulz", &newton_schulz);
  m.impl("muon_step_", &muon_step_);
}

}  // namespace spectral_kernels::cuda
