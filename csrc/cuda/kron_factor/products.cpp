#include "products.h"

#include <algorithm>
#include <utility>

#include "../base/device.h"
#include "../base/slices.h"
#include "../base/switches.h"
#include "../base/tensors.h"
#include "../symmetric_matmul/product.h"

namespace spectral_kernels::cuda {
namespace {

// Matrices of one shape and with common strides; a side without data is the identity.
struct Run {
  Matrices x, left, right, out;
  int64_t rows = 0, columns = 0, count = 0;
  bool both() const { return left.data != nullptr && right.data != nullptr; }
};

bool absent(const Tensor& t) { return !t.defined() || t.numel() == 0; }

Matrices turned(Matrices m) {
  std::swap(m.row, m.column);
  return m;
}

Run part_of(Run run, int64_t index, int64_t count) {
  for (Matrices* m : {&run.x, &run.left, &run.right, &run.out}) advance(*m, index);
  run.count = count;
  return run;
}

Prologue packing(int planes) {
  Prologue prologue;
  prologue.f16 = true;
  prologue.planes = planes;
  return prologue;
}

Entry entry_of(const Matrices& source, const Matrices& target, int64_t rows, int64_t columns,
               int64_t count, int64_t first) {
  Entry e;
  e.source = source;
  e.target = target;
  e.rows = int(rows);
  e.columns = columns;
  e.count = count;
  e.first = first;
  return e;
}

// Products A X of a list, each with the entry that A is packed by.
struct Stage {
  std::vector<Entry> products, sides;

  void run(Product product, uint32_t* largest, const Tensor& like, const char* op) {
    const int64_t packed = place_packed(products, 2);
    const Tiling tiling =
        place_products(products, 2, 2, multiprocessors_of_kind(device_number(like)));
    std::vector<Entry> operands = products;
    for (size_t i = 0; i < sides.size(); i++) {
      sides[i].packed.line = packed_line(sides[i].columns);
      sides[i].packed.plane = packed + products[i].square;
      operands.push_back(sides[i]);
    }
    const Tensor workspace = empty({packed + tiling.squares}, like, kShort);
    uint16_t* const x = reinterpret_cast<uint16_t*>(workspace.data_ptr());
    void* stream = stream_of(like);
    check_launch(launch_prologue(operands, packing(2), largest, x, {}, stream), op);
    product.shape = Shape::kWide;
    product.format = {2, true};
    product.a = x + packed;
    product.b = x;
    ProductBuffers buffers;
    buffers.largest = largest;
    check_launch(launch_product(products, product, tiling.tile, buffers, stream), op);
  }
};

int64_t bytes_of(const Run& run) {
  const auto packed = [](int64_t rows, int64_t columns) { return rows * packed_line(columns) * 4; };
  const int64_t left = run.left.data == nullptr ? 0 : packed(run.rows, run.rows);
  const int64_t right = run.right.data == nullptr ? 0 : packed(run.columns, run.columns);
  return std::max(packed(run.rows, run.columns), packed(run.columns, run.rows)) +
         std::max(left, right) + (run.both() ? run.rows * run.columns * 4 : 0);
}

// X right is the product (rightᵀ Xᵀ)ᵀ, so that one kernel serves both sides. left X is left in its
// packed scale, where it can neither overflow nor vanish, and packed once more.
void multiply(const std::vector<Run>& runs, const Tensor& like, const char* op) {
  int64_t count = 0, elements = 0;
  for (const Run& run : runs) {
    count += run.count;
    if (run.both()) elements += run.count * run.rows * run.columns;
  }
  // Of the last product's X and A, and of those of the one before.
  const Tensor sizes = zeros({4 * count}, like, kInt);
  const Tensor between = empty({elements}, like, kFloat);
  uint32_t* const largest = reinterpret_cast<uint32_t*>(sizes.data_ptr());
  Stage before, last;
  std::vector<Entry> given, made;
  int64_t first = 0, element = 0;
  for (const Run& run : runs) {
    const int64_t m = run.rows, n = run.columns;
    Matrices x = run.x, out = run.out;
    if (run.both()) {
      x.data = between.data_ptr<float>() + element;
      x.type = Type::kF32;
      x.row = n;
      x.column = 1;
      x.batch = m * n;
      element += run.count * m * n;
      before.products.push_back(entry_of(run.x, x, m, n, run.count, 2 * count + first));
      before.sides.push_back(entry_of(run.left, {}, m, m, run.count, 3 * count + first));
      given.push_back(before.products.back());
      given.push_back(before.sides.back());
    }
    if (run.right.data != nullptr) {
      last.products.push_back(entry_of(turned(x), turned(out), n, m, run.count, first));
      last.sides.push_back(entry_of(turned(run.right), {}, n, n, run.count, count + first));
    } else {
      last.products.push_back(entry_of(x, out, m, n, run.count, first));
      last.sides.push_back(entry_of(run.left, {}, m, m, run.count, count + first));
    }
    (run.both() ? made : given).push_back(last.products.back());
    given.push_back(last.sides.back());
    first += run.count;
  }
  void* stream = stream_of(like);
  check_launch(launch_largest(given, Of::kSource, largest, stream), op);
  if (!made.empty()) {
    before.run({}, largest, like, op);
    check_launch(launch_largest(made, Of::kSource, largest, stream), op);
  }
  Product product;
  product.unshift = 1;
  product.x_f16 = true;
  for (int i = 0; i < 3; i++) product.others[i] = largest + (i + 1) * count;
  last.run(product, largest, like, op);
}

}  // namespace

void two_sided(const std::vector<TwoSided>& list, const char* op) {
  std::vector<Run> runs;
  for (const TwoSided& given : list) {
    if (given.out.numel() == 0) continue;
    const Tensor left = absent(given.left) ? Tensor() : given.left;
    const Tensor right = absent(given.right) ? Tensor() : given.right;
    if (!left.defined() && !right.defined()) {
      given.out.copy_(given.x);
      continue;
    }
    const int64_t count = leading(given.x);
    const bool common = common_strides({given.x, left, right, given.out});
    for (int64_t i = 0; i < count; i += common ? count : 1) {
      Run run{matrices_from(given.x, i), matrices_from(left, i), matrices_from(right, i),
              matrices_from(given.out, i)};
      run.rows = given.x.size(-2);
      run.columns = given.x.size(-1);
      run.count = common ? count : 1;
      runs.push_back(run);
    }
  }
  in_slices(runs, switches().product_workspace, bytes_of,
            [&](const std::vector<Run>& slice) { multiply(slice, list[0].x, op); });
}

Accumulation::Accumulation(const std::vector<Accumulate>& list, const char* op) : op_(op) {
  int64_t matrices = 0;
  for (const Accumulate& given : list) {
    if (given.out.numel() == 0) continue;
    const int64_t count = leading(given.out);
    const bool common = common_strides({given.x, given.factor, given.out});
    for (int64_t i = 0; i < count; i += common ? count : 1) {
      Entry e = entry_of(matrices_from(given.x, i, given.rows), matrices_from(given.out, i),
                         given.out.size(-1), given.x.size(given.rows ? -1 : -2), common ? count : 1,
                         matrices);
      e.momentum = matrices_from(given.factor, i);
      e.scale = float(given.weight);
      e.keep = float(given.beta);
      matrices += e.count;
      entries.push_back(e);
    }
  }
  if (entries.empty()) return;
  largest = zeros({matrices}, list[0].x, kInt);
  check_launch(launch_largest(entries, Of::kSource, largest_bits(), stream_of(largest)), op_);
}

void Accumulation::run(NonFinite nonfinite) const {
  std::vector<Entry> halves, full;  // a number of 16 bits is one of fp16, but for its exponent
  for (const Entry& e : entries) (e.source.type == Type::kF32 ? full : halves).push_back(e);
  run(halves, 1, nonfinite);
  run(full, 2, nonfinite);
}

void Accumulation::run(const std::vector<Entry>& list, int planes, NonFinite nonfinite) const {
  // Beside the packed matrix at most 4 parts of every tile.
  const auto bytes = [](const Entry& e) {
    return e.rows * (packed_line(e.columns) * 4 + packed_line(e.rows) * 8);
  };
  in_slices(list, switches().product_workspace, bytes, [&](std::vector<Entry> slice) {
    const int64_t packed = place_packed(slice, planes);
    const Tiling tiling =
        place_products(slice, planes, planes, multiprocessors_of_kind(device_number(largest)));
    const Tensor workspace = empty({packed}, largest, kShort);
    const Tensor parts = empty({tiling.parts}, largest, kFloat);
    const Tensor arrived = zeros({tiling.tiles}, largest, kInt);
    std::vector<Entry> sources = slice;
    for (Entry& e : sources) e.momentum = {};
    uint16_t* const x = reinterpret_cast<uint16_t*>(workspace.data_ptr());
    void* stream = stream_of(largest);
    check_launch(launch_prologue(sources, packing(planes), largest_bits(), x, {}, stream), op_);
    Product product;
    product.shape = Shape::kGram;
    product.format = {planes, true};
    product.exact = true;
    product.a = product.b = x;
    product.unshift = 2;
    product.x_f16 = true;
    product.update.add = true;
    product.update.nonfinite = nonfinite;
    ProductBuffers buffers;
    buffers.parts = parts.data_ptr<float>();
    buffers.arrived = reinterpret_cast<uint32_t*>(arrived.data_ptr());
    buffers.largest = largest_bits();
    check_launch(launch_product(slice, product, tiling.tile, buffers, stream), op_);
  });
}

void accumulate(const std::vector<Accumulate>& list, const char* op) {
  const Accumulation all(list, op);
  if (!all.entries.empty()) all.run(NonFinite::kPropagate);
}

}  // namespace spectral_kernels::cuda
