// Every kernel of the instruction set that is named, or of the best one.
#include "../../csrc/cpu/isa/select.h"
#include "programs.h"

int main(int count, char** arguments) {
  using namespace spectral_kernels::cpu;
  const std::string wanted = count > 1 ? arguments[1] : "";
  set_isa_cap(wanted);
  const Kernels& kernels = spectral_kernels::cpu::kernels();
  check(wanted.empty() || kernels.name == wanted, wanted + " runs here");
  for (const bool images : {false, true}) {
    with_images = images;
    if (images && kernels.image_words[int(Kind::kBF16)] == 0) continue;
    for (const Kind kind : {Kind::kF32, Kind::kF64, Kind::kBF16})
      if (!images || kind == Kind::kBF16) check_products(kernels, kind);
    check_packing(kernels);
    check_elementwise(kernels);
  }
  for (const Kind kind : {Kind::kF32, Kind::kBF16}) check_long_sums(kernels, kind);
  check_products_in_place(kernels);
  check_reflections(kernels);
  check_eigen(kernels);
  std::printf("%s: %d checks, %d failures\n", kernels.name, checks, failures);
  return failures == 0 ? 0 : 1;
}
