#include "plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <mutex>
#include <tuple>
#include <utility>

#include "../../check.h"
#include "../base/device.h"
#include "../base/switches.h"
#include "../base/tensors.h"
#include "orthogonalize.h"
#include "schatten_norm.h"

namespace spectral_kernels::cuda {
namespace {

constexpr int64_t kMostSquares = 1 << 24;  // elements that are worked on at a time
// Of a product of a list that is iterated on in one launch. A launch that follows another costs
// some 3 µs, to drain and to fill the device; an item that waits for others some 1, for a fence,
// a counter and its next reader. Against these 2 µs stand the counter and the fence of every
// item, 1900 clocks, of which 3 or 4 blocks on a multiprocessor hide all but a tenth of the time
// of an item: equal at 20 µs. A model; no card has run it yet.
constexpr double kMostQueueClocks = 40000;

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

bool Route::operator<(const Route& other) const {
  return std::tie(square_planes, cuts) < std::tie(other.square_planes, other.cuts);
}

Plan::Plan(ArrayRef<double> flat_rows, const std::string& method_, ScalarType compute_dtype,
           double eps_, const std::string& norm, double norm_factor_, const char* op_)
    : method(method_), norm_factor(norm_factor_), eps(eps_), op(op_) {
  CHECK_VALUE(!flat_rows.empty() && flat_rows.size() % 3 == 0,
              "rows must hold a, b, c for every step, got ", flat_rows.size(), " numbers");
  check_one_of(method, "method", {"auto", "standard", "gram"});
  check_one_of(norm, "norm", {"frobenius", "schatten8"});
  CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and at least 0, got ", eps);
  CHECK_VALUE(norm_factor > 0 && std::isfinite(norm_factor),
              "norm_factor must be positive and finite, got ", norm_factor);
  CHECK_IMPLEMENTED(compute_dtype == kFloat || compute_dtype == kHalf || compute_dtype == kBFloat16,
                    op, ": the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64");
  for (size_t i = 0; i < flat_rows.size(); i += 3)
    rows.push_back({flat_rows[i], flat_rows[i + 1], flat_rows[i + 2]});
  full = compute_dtype == kFloat;
  f16 = compute_dtype != kBFloat16;
  planes = full ? 2 : 1;
  schatten8 = norm == "schatten8";
}

std::vector<int64_t> Plan::cuts(IntArrayRef restarts) const {
  std::vector<int64_t> steps;
  if (method == "standard" || (method == "auto" && full && restarts.empty()))
    for (size_t t = 1; t < rows.size(); t++) steps.push_back(int64_t(t));
  else
    steps.assign(restarts.begin(), restarts.end());
  return steps;
}

Route Plan::products(const Entry& e, IntArrayRef restarts) const {
  Route route;
  const bool gram = method == "gram" || (method == "auto" && e.columns >= kLeastGramRatio * e.rows);
  route.square_planes = full || gram ? 2 : 1;
  if (full || gram)
    route.cuts = cuts(restarts);
  else
    for (size_t t = 1; t < rows.size(); t++) route.cuts.push_back(int64_t(t));
  return route;
}

Route Plan::route(const Entry& e, IntArrayRef restarts, int64_t shared_memory) const {
  if (onchip_bytes(e.rows) <= shared_memory) return {cuts(restarts), 0};
  CHECK_IMPLEMENTED(product_shared_bytes(planes, 128) <= shared_memory, op, ": products need ",
                    product_shared_bytes(planes, 128),
                    " bytes of shared memory, and this device has ", shared_memory);
  return products(e, restarts);
}

std::vector<Segment> Plan::segments(const std::vector<int64_t>& steps) const {
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
  CHECK_IMPLEMENTED(plan_segments(rows, steps, f16, schatten8, norm_factor, eps, out), op,
                    ": these coefficients grow beyond what the CUDA C++ kernels can hold");
  if (kept.size() == kMostKept) kept.clear();
  return kept.emplace(key, std::move(out)).first->second;
}

Scratch::Scratch(const OnChipSizes& sizes, const Tensor& like)
    : like_(like), packed_(sizes.packed), matrices_(sizes.matrices) {
  const int64_t packed = aligned(sizes.packed * 2), parts = aligned(sizes.parts * 4),
                q = aligned(sizes.q * 2), alpha = aligned(sizes.matrices * 4);
  char* at = bytes(packed + parts + q + alpha);
  counters_ = zeros({4 * sizes.matrices + 1}, like, kInt);
  buffers.packed = reinterpret_cast<uint16_t*>(at);
  buffers.parts = reinterpret_cast<float*>(at += packed);
  buffers.q = reinterpret_cast<uint16_t*>(at += parts);
  buffers.alpha = reinterpret_cast<float*>(at += q);
}

ProductWorkspaces Scratch::for_products(const std::vector<ProductPlan>& plans) {
  int64_t squares = 0, parts = 0, tiles = 0;
  for (const ProductPlan& plan : plans) {
    squares = std::max(squares, plan.tiling.squares);
    parts = std::max(parts, plan.tiling.parts);
    tiles = std::max(tiles, plan.tiling.tiles);
  }
  const int64_t next = squares == 0 ? 0 : aligned(packed_ * 2), square = aligned(squares * 2);
  char* at = bytes(next + ProductPlan::kSquares * square + parts * 4);
  ProductWorkspaces work;
  work.x = buffers.packed;
  work.next = reinterpret_cast<uint16_t*>(at);
  work.squares = reinterpret_cast<uint16_t*>(at += next);
  work.buffers.parts = reinterpret_cast<float*>(at + ProductPlan::kSquares * square);
  if (tiles != 0) {
    kept_.push_back(zeros({tiles}, like_, kInt));
    work.buffers.arrived = reinterpret_cast<uint32_t*>(kept_.back().data_ptr());
  }
  work.buffers.queue = largest() + 3 * matrices_;
  work.buffers.largest = largest();
  work.factor = norms.factor;
  return work;
}

void Scratch::add_norms(std::vector<Entry>& entries, const Plan& plan) {
  const int64_t partial = aligned(place_norms(entries) * 8);
  char* at = bytes(partial + matrices_ * 4);
  norms.squares = reinterpret_cast<double*>(at);
  norms.factor = reinterpret_cast<float*>(at + partial);
  norms.arrived = largest() + 2 * matrices_;
  if (plan.schatten8) return;  // follows from the plain norm
  norms.norm_factor = float(plan.norm_factor);
  norms.eps = float(plan.eps);
}

char* Scratch::bytes(int64_t count) {
  kept_.push_back(empty({count}, like_, kByte));
  return static_cast<char*>(kept_.back().data_ptr());
}

Lists::Lists(const Plan& plan, const Tensor& like)
    : plan_(plan), like_(like), shared_memory_(shared_memory_of(like)) {}

void Lists::add(const Tensor& source, const Tensor& momentum, const Tensor& target, float scale,
                IntArrayRef restarts) {
  append(entries, source, momentum, target, scale);
  while (routes_.size() < entries.size())
    routes_.push_back(plan_.route(entries[routes_.size()], restarts, shared_memory_));
}

void Lists::place() {
  std::map<Route, std::vector<size_t>> groups;
  for (size_t i = 0; i < entries.size(); i++) groups[routes_[i]].push_back(i);
  for (const auto& group : groups) {
    const std::vector<Segment>& segments = segments_[group.first] =
        plan_.segments(group.first.cuts);
    for (const size_t i : group.second)
      entries[i].packed.direct = group.first.square_planes == 0 &&
                                 readable_in_place(entries[i], plan_.f16, plan_.planes, segments);
  }
  scratch.emplace(place_onchip(entries, plan_.planes), like_);
  const bool products = groups.rbegin()->first.square_planes != 0;
  if (products) scratch->add_norms(entries, plan_);
  for (const auto& group : groups) {
    if (group.first.square_planes != 0) {
      place_products(group.first, group.second);
      continue;
    }
    std::vector<Entry>& list = onchip_[group.first];
    for (const size_t i : group.second) list.push_back(entries[i]);
  }
  if (products) workspaces_ = scratch->for_products(products_);
}

// Lists of products whose square matrices are not too many at a time.
void Lists::place_products(const Route& route, const std::vector<size_t>& indices) {
  for (size_t at = 0; at < indices.size();) {
    ProductPlan part;
    part.f16 = plan_.f16;
    part.planes = plan_.planes;
    part.square_planes = route.square_planes;
    for (int64_t size = 0; at < indices.size(); at++) {
      const Entry& e = entries[indices[at]];
      size += e.count * e.rows * e.rows;
      if (!part.entries.empty() && size > kMostSquares) break;
      part.entries.push_back(e);
    }
    const int device = device_number(like_);
    if (route.square_planes == 1) part.wgmma = wgmma_multiprocessors(device);
    cuda::place(part, multiprocessors_of_kind(device));
    part.queue =
        part.wgmma == 0 && switches().queue.load().value_or(part.tiling.clocks <= kMostQueueClocks);
    products_.push_back(std::move(part));
    product_routes_.push_back(route);
  }
}

void Lists::iterate(const Update& update, void* stream) {
  for (const auto& list : onchip_)
    check_launch(launch_newton_schulz(list.second, segments_[list.first], plan_.f16, plan_.planes,
                                      scratch->largest(), scratch->buffers, update, stream),
                 plan_.op);
  for (size_t i = 0; i < products_.size(); i++) {
    if (plan_.schatten8)
      check_launch(launch_schatten_norm(products_[i], workspaces_, scratch->norms,
                                        float(plan_.norm_factor), float(plan_.eps), stream),
                   plan_.op);
    check_launch(
        launch_products(products_[i], segments_[product_routes_[i]], workspaces_, update, stream),
        plan_.op);
  }
}

void Lists::run(void* stream) {
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

float Lists::most() const {
  float most = 0;
  for (const auto& segments : segments_) most = std::max(most, segments.second.back().most);
  return most;
}

std::vector<Entry> Lists::packed() const {
  std::vector<Entry> list;
  std::copy_if(entries.begin(), entries.end(), std::back_inserter(list),
               [](const Entry& e) { return !e.packed.direct; });
  return list;
}

void orthogonalize(const std::vector<Tensor>& list, ArrayRef<double> rows, ScalarType compute_dtype,
                   const char* op) {
  if (list.empty()) return;
  const Plan plan(rows, "auto", compute_dtype, 0, "schatten8", 1, op);
  Lists lists(plan, list[0]);
  for (const Tensor& x : list) lists.add(x, {}, x, 1, {});
  lists.run(stream_of(list[0]));
}

}  // namespace spectral_kernels::cuda
