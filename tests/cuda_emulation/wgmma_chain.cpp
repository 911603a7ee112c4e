// Three products by wgmma that read what the one before has written, without torch: for tests of
// kernels that were changed on purpose.
//
//   g++ -x c++ -include emulation.h wgmma_chain.cpp
#include <vector>

#include "../../csrc/cuda/symmetric_matmul/product.h"

namespace {

constexpr size_t kAlignment = 64;  // elements
constexpr size_t kFailureBytes = 300;

// Of 16 bits or of floats, all NaN, aligned as tensor maps ask for.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t size) : values_(size_t(size) + kAlignment) {
    memset(values_.data(), 0xFF, values_.size() * sizeof(T));
  }
  T* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(values_.data());
    const uintptr_t step = kAlignment * sizeof(uint16_t);
    return reinterpret_cast<T*>((at + step - 1) / step * step);
  }

 private:
  std::vector<T> values_;
};

}  // namespace

// R = X X', W = 2 R R - 1.5 R + 3 I, Y = W X + 0.5 X of `count` matrices of
// rows x columns, with rows of `line` numbers in X and Y and of `square` in R and W. Returns 0, the
// error of a launch, or -1 for a failure of the emulation, which stands in `failure`
// then, of kFailureBytes.
extern "C" int wgmma_chain(int rows, int64_t columns, int64_t count, int f16, int multiprocessors,
                           int residents, int delivery, const uint16_t* given, uint16_t* r,
                           uint16_t* w, uint16_t* y, char* failure) {
  using namespace spectral_kernels::cuda;
  emulation::residents = residents;
  emulation::delivery = emulation::Delivery(delivery);
  emulation::set_order(0);
  std::vector<Entry> entries(1);
  Entry& e = entries[0];
  e.rows = rows;
  e.columns = columns;
  e.count = count;
  e.packed.line = packed_line(columns);
  const Tiling tiling = place_products_wgmma(entries, multiprocessors);
  const int64_t size = count * rows * e.packed.line;
  Workspace<uint16_t> x(size), result(size), gram(tiling.squares), product(tiling.squares);
  Workspace<float> parts(tiling.parts);
  std::vector<uint32_t> arrived(size_t(tiling.tiles)), largest(size_t(count), 1);
  std::copy_n(given, size, x.data());
  ProductBuffers buffers;
  buffers.parts = parts.data();
  buffers.arrived = arrived.data();
  buffers.largest = largest.data();
  const Format format{1, f16 != 0};
  Product first;
  first.shape = Shape::kGram;
  first.format = format;
  first.a = first.b = x.data();
  first.d = gram.data();
  first.d_format = format;
  Product second;
  second.format = second.c_format = format;
  second.d_format = format;
  second.a = second.b = second.c = gram.data();
  second.d = product.data();
  second.alpha = 2;
  second.beta = -1.5f;
  second.gamma = 3;
  Product third;
  third.shape = Shape::kWide;
  third.format = third.c_format = third.d_format = format;
  third.a = product.data();
  third.b = third.c = x.data();
  third.d = result.data();
  third.beta = .5f;
  int error = 0;
  try {
    for (const Product& p : {first, second, third})
      if (error == 0) error = launch_product_wgmma(entries, p, buffers, multiprocessors, nullptr);
    for (const uint32_t left : arrived)
      if (left != 0) emulation::die("an arrival counter is not as it was");
  } catch (const std::exception& what) {
    snprintf(failure, kFailureBytes, "%s", what.what());
    return -1;
  }
  std::copy_n(gram.data(), tiling.squares, r);
  std::copy_n(product.data(), tiling.squares, w);
  std::copy_n(result.data(), size, y);
  return error;
}
