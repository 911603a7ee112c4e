#include "eigen.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../check.h"
#include "../../counters.h"
#include "../lapack.h"
#include "../lapack_checks.h"
#include "divide.h"
#include "tridiagonal.h"

namespace spectral_kernels::cpu {
namespace {

enum class Route { kAuto, kOwn, kLapack };
std::atomic<Route> route{Route::kAuto};

// The least matrix that our own kernels decompose. By measurement, against LAPACK in fp64 on one
// thread, which is what it may use: with AVX2 they are faster from 2 rows on (Zen 3 and MKL, 1.2 to
// 2.8 times, to 3072 rows, single and in batches), but for small matrices, which LAPACK does not
// divide either, its steps round less: 0.3 to 1 of the error. For no other instruction set anything
// was measured.
int64_t least_own() {
  return std::strcmp(kernels().name, "avx2") == 0 ? 32 : std::numeric_limits<int64_t>::max();
}

bool by_own_kernels(int64_t n) {
  const Route asked = route.load();
  return n > 0 && (asked == Route::kAuto ? n >= least_own() : asked == Route::kOwn);
}

size_t own_bytes(int64_t n) {
  return DivideSpace::left_bytes(n) + Tridiagonal::bytes(n) + DivideSpace::bytes(n);
}

// Householder reflections to a tridiagonal matrix, divide and conquer, and the reflections back.
bool decompose(int64_t n, const double* a, double* values, double* vectors, int threads) {
  const Matrix given{const_cast<double*>(a), n, n, n, 1, DType::kF64};
  const int exponent = exponent_of(max_abs(given, threads));
  Workspace workspace(own_bytes(n));
  // What is left of A, then operands of products, then the vectors.
  double* const shared = static_cast<double*>(workspace.take(DivideSpace::left_bytes(n)));
  const Panels panels = panels_at(shared, n, n, Kind::kF64);
  Tridiagonal t(workspace, n);
  const DivideSpace space(workspace, n, shared);
  Pack pack;
  pack.x = given;
  pack.shift = -exponent;
  pack.out = panels;
  run(pack, threads);
  tridiagonalize(panels, t, threads);
  if (!tridiagonal_eigen(n, t.d, t.e, space, threads)) return false;
  Pack columns;
  columns.x = Matrix{space.spare, n, n, space.pitch, 1, DType::kF64};
  columns.out_t = panels;
  run(columns, threads);
  const Matrix rows{vectors, n, n, n, 1, DType::kF64};
  apply_reflections(t, panels, rows.transposed(), threads);
  for (int64_t i = 0; i < n; i++) values[i] = std::ldexp(t.d[size_t(i)], exponent);
  corrupt_columns(vectors, n, n);
  return is_eigendecomposition(n, a, values, vectors);
}

}  // namespace

bool eigendecompose(int64_t n, const double* a, double* values, double* vectors, int threads) {
  if (by_own_kernels(n)) {
    if (decompose(n, a, values, vectors, threads)) return true;
    count_fault("eigh");
  }
  bool converged = false;
  lapack_jobs("eigh", 1, [&](int64_t) { return converged = eigh(n, a, values, vectors); });
  return converged;
}

size_t eigen_bytes(int64_t n) {
  return by_own_kernels(n) ? own_bytes(n) + reflections_bytes(n) : 0;
}

void set_eigen_route(const char* name) {
  CHECK_VALUE(
      !std::strcmp(name, "auto") || !std::strcmp(name, "own") || !std::strcmp(name, "lapack"),
      "route must be 'auto', 'own' or 'lapack', got '", name, "'");
  route = *name == 'a' ? Route::kAuto : *name == 'o' ? Route::kOwn : Route::kLapack;
}

}  // namespace spectral_kernels::cpu
