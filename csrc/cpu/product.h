// Packing and products of packed matrices, spread over threads. What is computed never depends on the
// number of threads: tiles and jobs only say who computes what.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

size_t element_size(DType dtype);
size_t panel_bytes(int64_t rows, int64_t cols, Kind kind);
// Panels in a workspace; the caller has counted panel_bytes() into its size.
Panels take_panels(Workspace& workspace, int64_t rows, int64_t cols, Kind kind);

void run(const Product& product, int threads);
void run(const Pack& pack, int threads);
void run(const Combine& combine, int threads);

// Multiply-adds below which a second thread costs more than it brings.
constexpr double kThreadGrain = 1 << 20;

// Largest absolute value of a matrix (0 for an empty one), or NaN if an element is not finite.
double max_abs(const Matrix& m, int threads);
// e such that 2^e <= x < 2^(e+1); 0 for x = 0.
int exponent_of(double x);
// The fp64 sum of the diagonal of a square packed matrix, in order.
double trace(const Panels& p);
// The fp64 sum of the squares of a packed F32 or F64 matrix, in a fixed order.
double sum_of_squares(const Panels& p);

// Every element = value; every element *= factor (rounded once, from fp32 or fp64).
void fill(const Matrix& m, double value);
void scale_in_place(const Matrix& m, double factor);
// to = 2^shift from, converted once; for where a packed copy would not pay.
void copy_scaled(const Matrix& from, int shift, const Matrix& to);

}  // namespace spectral_kernels::cpu
