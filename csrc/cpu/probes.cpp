#include "probes.h"

namespace spectral_kernels::cpu {

std::vector<double> Probes::signs(int64_t n, int64_t count) {
  std::vector<double> signs(size_t(n * count));
  uint32_t state = 1;
  for (double& sign : signs) {
    state = state * 1664525u + 1013904223u;
    sign = state >> 31 ? -1.0 : 1.0;
  }
  return signs;
}

Probes::Probes(int64_t n, Kind kind)
    : workspace(bytes(n, kind)),
      columns(take_panels(workspace, n, kCount, kind)),
      weighted(take_panels(workspace, n, kCount, kind)),
      image(take_panels(workspace, n, kCount, kind)),
      next(take_panels(workspace, n, kCount, kind)) {
  std::vector<double> values = signs(n);
  Pack pack;
  pack.x = Matrix{values.data(), n, kCount, kCount, 1, DType::kF64};
  pack.out = columns;
  run(pack, 1);
}

}  // namespace spectral_kernels::cpu
