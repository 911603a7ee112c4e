// Packing and products of packed matrices, spread over threads. What is computed never depends on
// the number of threads: tiles and jobs only say who computes what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tiles.h"
#include "workspace.h"

namespace spectral_kernels::cpu {

size_t element_size(DType dtype);
size_t panel_bytes(int64_t rows, int64_t cols, Kind kind, Held held = Held::kPanels);
// Panels of a matrix without an image in memory that the caller has for them.
Panels panels_at(void* data, int64_t rows, int64_t cols, Kind kind);
// Panels in a workspace; the caller has counted panel_bytes() into its size.
Panels take_panels(Workspace& workspace, int64_t rows, int64_t cols, Kind kind,
                   Held held = Held::kPanels);

// AᵀB, and with Aᵀ where the caller has it.
Product multiply(const Panels& a, const Panels& b);
Product multiply(const Panels& a, const Panels& a_t, const Panels& b);

void run(const Product& product, int threads);
void run(const InPlace& p, int threads);
void run(const Pack& pack, int threads);
void run(const Combine& combine, int threads);
void run(const Scale& scale, int threads);
// Every column j of X, F32 or F64, times by[j], and so every row of Xᵀ; both in place.
void scale_columns(const Panels& x, const Panels& x_t, const double* by, int threads);
// Block rows of an m-row matrix of a kind: the slots of the sums below.
int64_t row_blocks(int64_t m, Kind kind);
double run(const SquareAverage& work, int threads);  // returns the sum of all slots
double run(const AdaptedLength& work, int threads);  // likewise
void run(const AdamMoments& work, int threads);
void run(const Momentum& work, int threads);
void run(const VarianceAdaptation& work, int threads);
double run(const SignAdaptation& work, int threads);  // pass 0: the sum of the new V
// Rows [r0, r0 + rows) and columns [c0, c0 + cols) of a packed F32 or F64 matrix; c0 is a multiple
// of P.
Panels part(const Panels& p, int64_t r0, int64_t rows, int64_t c0, int64_t cols);

// Multiply-adds below which a second thread costs more than it brings.
constexpr double kThreadGrain = 1 << 20;

// Largest absolute value of a matrix (0 for an empty one), or NaN if an element is not finite.
double max_abs(const Matrix& m, int threads);
// The same of the triangle on and below the diagonal.
double max_abs_lower(const Matrix& m);
// e such that 2^e <= x < 2^(e+1); 0 for x = 0.
int exponent_of(double x);
// All of a packed matrix, zeros included, as one row of numbers.
Matrix flat(const Panels& p);
// Element (i, j).
double element(const Panels& p, int64_t i, int64_t j);
double element(const Matrix& m, int64_t i, int64_t j);
void set_element(const Panels& p, int64_t i, int64_t j, double value);  // F32 and F64
// The fp64 sum of the diagonal, in order.
double trace(const Panels& p);
// Sums of |a_ij| or a_ij b_ij over i, for every j, in fp64 and a fixed order.
std::vector<double> column_sums(ColumnSum what, const Panels& a, const Panels& b, int threads);
double sum_of_squares(const Panels& p, int threads);

// Every element = value; every element *= factor (rounded once, from fp32 or fp64).
void fill(const Matrix& m, double value);
void scale_in_place(const Matrix& m, double factor);
// to = 2^shift from, converted once; for where a packed copy would not pay.
void copy_scaled(const Matrix& from, int shift, const Matrix& to);

}  // namespace spectral_kernels::cpu
