// The tile products of the AMX set, the tiles emulated.
#include "../../csrc/cpu/isa/sets.h"
#include "programs.h"

namespace spectral_kernels::cpu {

// What the set stands on needs AVX-512; the products under test need its panels only.
const Kernels& avx512bf16::table() {
  static const Kernels kTable = [] {
    Kernels kernels{};
    kernels.panel[int(Kind::kF32)] = kernels.panel[int(Kind::kBF16)] = 32;
    kernels.multiply_adds[int(Kind::kF32)] = [](int64_t rounds) { return double(rounds); };
    return kernels;
  }();
  return kTable;
}

}  // namespace spectral_kernels::cpu

int main() {
  using namespace spectral_kernels::cpu;
  for (const Kind kind : {Kind::kF32, Kind::kBF16}) check_products(amx::table(), kind);
  with_images = true;
  check_products(amx::table(), Kind::kBF16);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
