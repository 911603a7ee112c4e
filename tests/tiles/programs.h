// The parts of this program.
#pragma once

#include <algorithm>

#include "dense.h"

namespace spectral_kernels::cpu {

void check_products(const Kernels& kernels, Kind kind);
void check_long_sums(const Kernels& kernels, Kind kind);
void check_products_in_place(const Kernels& kernels);
void check_packing(const Kernels& kernels);
void check_elementwise(const Kernels& kernels);
void check_reflections(const Kernels& kernels);
void check_eigen(const Kernels& kernels);

}  // namespace spectral_kernels::cpu
