// What tests set in the emulation, and ask it. The operators of csrc/cuda run by it on CPU tensors:
// torch.ops.spectral_kernels_emulated, with the schemas of csrc/ops.cpp.
#include <utility>

#include "../../csrc/cuda/base/device.h"
#include "../../csrc/cuda/base/switches.h"
#include "emulation.h"
// What kernels include needs the emulation before it.
#include "../../csrc/cuda/symmetric_matmul/product.h"
#include "../../csrc/cuda/symmetric_matmul/stream_k.h"

extern "C" void set_emulation(int order, int truncation, const char* left_out, int64_t limit,
                              int residents, int queue, int multiprocessors, int wgmma,
                              int delivery) {
  emulation::shared_limit = limit;
  emulation::residents = residents;
  emulation::multiprocessors = multiprocessors;
  spectral_kernels::cuda::switches().queue =
      queue < 0 ? std::nullopt : std::optional<bool>(queue > 0);
  spectral_kernels::cuda::switches().wgmma = wgmma != 0;
  emulation::delivery = emulation::Delivery(delivery);
  emulation::set_order(order);
  emulation::set_truncation(truncation != 0);
  emulation::leave_out(left_out);
}

// Pieces of a matrix in the order of its stretches, six numbers each; how many there are.
extern "C" int64_t stream_k_pieces(int64_t tiles, int64_t steps, int multiprocessors,
                                   int most_parts, int64_t* pieces, int64_t most) {
  using namespace spectral_kernels::cuda;
  const Cut cut = stream_k(tiles, steps, multiprocessors, 512, 5461, most_parts);
  int64_t count = 0;
  for (int64_t stretch = 0; stretch < cut.stretches(); stretch++)
    for_each_piece(cut, stretch, [&](const Piece& piece) {
      const int64_t row[] = {stretch, piece.tile, piece.begin, piece.end, piece.part, piece.parts};
      for (int i = 0; i < 6 && count < most; i++) pieces[count * 6 + i] = row[i];
      count++;
    });
  return count;
}

extern "C" int names_wgmma(const char* architectures) {
  return int(spectral_kernels::cuda::names_wgmma(architectures));
}

// D = A A + beta C + I of symmetric bf16 matrices of `rows`, padded to `line` columns; of C and D
// there may be one triangle only.
extern "C" int product_with_c(int64_t rows, int64_t line, int tile, int64_t chunks, int lower_c,
                              int lower_d, float beta, const uint16_t* a, const uint16_t* c,
                              uint16_t* d, float* parts, uint32_t* arrived) {
  using namespace spectral_kernels::cuda;
  Entry e;
  e.rows = rows;
  e.columns = e.packed.line = line;
  e.count = 1;
  e.product.chunks = e.product.square_chunks = chunks;
  Product p;
  p.a = p.b = a;
  p.c = c;
  p.d = d;
  p.beta = beta;
  p.gamma = 1;
  p.c_format.lower = lower_c != 0;
  p.d_format.lower = lower_d != 0;
  uint32_t largest = 1;
  ProductBuffers buffers;
  buffers.parts = parts;
  buffers.arrived = arrived;
  buffers.largest = &largest;
  return launch_product({e}, p, tile, buffers, nullptr);
}

extern "C" void limit_workspace(int64_t bytes) {
  spectral_kernels::cuda::switches().product_workspace = bytes;
}

extern "C" long count_launches() { return std::exchange(emulation::launches, 0); }

extern "C" int64_t set_slice_elements(int64_t elements) {
  return spectral_kernels::cuda::switches().slice_elements.exchange(elements);
}
