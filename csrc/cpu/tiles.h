// The table of CPU micro-kernels. Torch-free: pointers and strides only, so that the same code can
// be driven by a sanitizer harness or an emulator. csrc/cpu/isa/ holds the kernels, written once
// and compiled for every instruction set; kernels() returns the set chosen at run time.
//
// One packed format serves both operands of every product. A matrix of r rows and c columns is cut
// into column panels of width P; element (i, j) lies at
//     (j / P) * r * P  +  i * P  +  j % P ,
// columns beyond c are zero. A product is C = Aᵀ B with A (k x m) and B (k x n) both in that
// format, so a symmetric matrix is its own left and right operand and never has to be packed again.
// In the BF16 kind an element is a 32-bit word that holds rows 2i (low half) and 2i + 1 (high
// half), which is what the dot-product instructions read; an odd last row is paired with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral_kernels::cpu {

enum class DType : int { kF32, kF64, kBF16, kF16 };

// What a product multiplies in. F32 and BF16 accumulate in fp32, F64 in fp64.
enum class Kind : int { kF32 = 0, kF64 = 1, kBF16 = 2 };
constexpr int kKinds = 3;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A strided matrix in the caller's memory (strides in elements).
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  DType dtype = DType::kF32;
  explicit operator bool() const { return data != nullptr; }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
};

// A packed matrix (see above). `stride` is the distance between panels in words; it exceeds a panel
// where this is a part of a larger packed matrix.
struct Panels {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  Kind kind = Kind::kF32;
  int64_t stride = 0;
  // The same matrix as products of a set that has such images (Kernels::image_words) read their
  // left operand: whoever writes the panels writes it too. Without `data` it is all there is.
  void* left = nullptr;
  explicit operator bool() const { return data != nullptr || left != nullptr; }
};

// What a packed matrix is held for: as the left operand of products too, or as nothing else.
enum class Held : int { kPanels, kLeftToo, kLeftOnly };

enum class Triangle : int { kNone, kUpper, kLower };

// C = alpha AᵀB + beta D + beta_panels E + gamma I, written to any of the outputs. With `symmetric`
// the caller vouches that AᵀB is symmetric: only blocks on and below the diagonal are computed, the
// rest is mirrored, so the result is exactly symmetric. D and E must then be symmetric too; only
// their lower triangles are read.
struct Product {
  Panels a, b;
  Panels a_t;  // Aᵀ, where the caller has it: what reads rows of it need not transpose A
  bool symmetric = false;
  bool whole = false;  // F32 numbers are multiplied as they are, never as sums of parts
  // Where a set reads them itself (Kernels::reads_rows): the rows of Aᵀ in the caller's memory, of
  // a symmetric product of A with itself. `a` and `b` are shapes then.
  Matrix rows;
  // Blocks of a triangular operand on its zero side are never read.
  Triangle a_shape = Triangle::kNone, b_shape = Triangle::kNone;
  double alpha = 1, beta = 0, beta_panels = 0, gamma = 0;
  Matrix add;         // D
  Panels add_panels;  // E, of any kind
  Panels out;         // C
  Panels out_t;       // Cᵀ
  Panels scaled;      // alpha2 C + gamma2 I
  double alpha2 = 1, gamma2 = 0;
  Panels copy;   // C again, in another kind
  Matrix store;  // C
};

// C = A B of matrices where they lie, all F32 or all F64, for products too small for packing to
// pay; the bits are those of a Product that is `whole`. B and C have unit column strides, A has a
// column.
struct InPlace {
  Matrix a, b, c;
};

// Reads a strided matrix once and writes it as panels: out = s X, out_t = s Xᵀ with s = 2^shift,
// which rounds nothing. With a momentum buffer M it first does M <- beta M + (1 - beta) (sign X)
// and packs M, or with `nesterov` the mix (1 - beta) (sign X) + beta M. M is written only here.
struct Pack {
  Matrix x;
  int shift = 0;
  Panels out, out_t;
  Matrix momentum;
  double beta = 0;
  bool nesterov = false;
  bool negate = false;
};

// alpha A + beta B + gamma I + delta D, of packed matrices of one shape and a strided one (D), to
// any of the outputs. A, B and D may be absent.
struct Combine {
  Panels a, b, out, out_t;
  double alpha = 1, beta = 0, gamma = 0, delta = 0;
  Matrix add, store;
};

// out_ij = row_i x_ij col_j, of the strict upper triangle only if `strict_upper`, + diagonal_i on
// the diagonal. Absent vectors are ones, or zeros for the diagonal. `out` may be x.
struct Scale {
  Panels x, out;
  const double *row = nullptr, *col = nullptr, *diagonal = nullptr;
  bool strict_upper = false;
};

// Householder reflections H = H_1 ... H_n = I - V T Vᵀ for which Hᵀ X is upper triangular, of one
// panel X (m x n, n <= P and m). V, unit lower trapezoidal, takes the place of X; T (P x P, upper,
// zeros below) and the signs of the diagonal of Hᵀ X, 1 for 0, are in fp64. A sum of squares of X
// must not overflow. Where that of a column, as far as it is left, is below 2^-102 (F64: 2^-969),
// it counts as zero.
struct Reflections {
  Panels x;
  double *t, *signs;
};

// Sums over the rows of every column, in fp64 and in the order of the rows.
enum class ColumnSum : int { kAbs, kDot };  // |a|, a b

// The elementwise parts of the fused steps. Each works on block rows [i0, i1) (units of P); sums go
// to one slot a block row, `row_blocks` of them, and are added up in their order.

// V <- beta V + weight G². sums[i]: of the new V.
struct SquareAverage {
  Matrix g, v;
  double beta = 0, weight = 1;
  double* sums = nullptr;
};

// sums[i]: of (m_scale M / (sqrt(v_scale V) + eps))², 0 where that divides 0 by 0.
struct AdaptedLength {
  Matrix m, v;
  double m_scale = 1, v_scale = 1, eps = 0;
  double* sums = nullptr;
};

// M <- beta1 M + (1 - beta1) G, V <- beta2 V + (1 - beta2) G², U = M / (sqrt(V) + eps), 0 for V =
// eps = 0.
struct AdamMoments {
  Panels g;
  Matrix m, v;
  double beta1 = 0, beta2 = 0, eps = 0;
  Panels out, out_t;  // U
};

// M <- beta1 M + (1 - beta1) G, and N = beta1 M + (1 - beta1) G with `nesterov`, else M, or its
// sign. Sums of squares of M and of G by row (length rows) and by column (row_blocks x cols), of V
// in all.
struct Momentum {
  Panels g;
  Matrix m;
  double beta1 = 0;
  bool nesterov = false, sign = false;
  Panels out;  // N; may be g
  Matrix v;    // may be absent
  double *m_rows = nullptr, *m_cols = nullptr, *g_rows = nullptr, *g_cols = nullptr,
         *v_sums = nullptr;
};

// How sqrt(energy / v) takes its eps: sqrt(energy / (v + eps)), or sqrt(energy) / (sqrt(v) + eps).
// 0 / 0 is 1.
enum class EpsPlace : int { kInside, kOutside };

// V <- beta2 V + (1 - beta2) e with e_ij = seen_row_i seen_col_j, and
// U = scale sqrt(t_ij / (v_scale V)) O with t_ij = row_i col_j. Without V, U = scale row_i col_j O.
struct VarianceAdaptation {
  Panels o;
  Matrix v;
  double beta2 = 0, v_scale = 1, eps = 0, scale = 1;
  EpsPlace place = EpsPlace::kInside;
  const double *seen_row = nullptr, *seen_col = nullptr, *row = nullptr, *col = nullptr;
  Panels out, out_t;  // U
};

// The elementwise norm. Pass 0: V <- beta2 V + (1 - beta2) e, sums[i] of the new V. Pass 1:
// M <- beta1 M + (1 - beta1) G and U = scale sqrt(t / (v_scale V)) sign(N). e and t are squares of
// m_scale M (the new M) or of G.
struct SignAdaptation {
  int pass = 0;
  Panels g;
  Matrix m, v;
  double beta1 = 0, beta2 = 0, m_scale = 1, v_scale = 1, eps = 0, scale = 1;
  bool nesterov = false, seen_m = false, top_m = true;
  EpsPlace place = EpsPlace::kInside;
  double* sums = nullptr;
  Panels out, out_t;
};

// How a product is cut into jobs, each a rectangle of blocks of the result.
struct Jobs {
  int64_t edge;  // blocks along the longest side of a job
  // What a job does once for each of its block rows and block columns, in units of the work on one
  // of its blocks.
  double row_cost, col_cost;
  // The share of a job that the threads are expected to wait for one that came late.
  double late;
  // Scratch memory of a job of `edge` blocks a side.
  size_t (*scratch_bytes)(int64_t edge);
};

struct Kernels {
  const char* name;
  const char* fp32;   // how F32 products are computed: "fma" or "tiles"
  double pair_rate;   // of BF16 products, where F32 ones have 1
  int panel[kKinds];  // P of each kind, 0 where the kind is not available
  // Blocks [i0, i1) x [j0, j1) of a product, in units of P, a job of at most jobs.edge a side.
  void (*product[kKinds])(const Product&, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                          void* scratch);
  Jobs jobs[kKinds];
  // Block rows [i0, i1) of a pack.
  void (*pack[kKinds])(const Pack&, int64_t i0, int64_t i1);
  // Block columns [j0, j1) of a combination, from fp32 [0] or fp64 [1] numbers.
  void (*combine[2])(const Combine&, int64_t j0, int64_t j1);
  void (*scale[2])(const Scale&, int64_t j0, int64_t j1);
  // Block columns [j0, j1) of the sums over two F32 or F64 matrices (one for kAbs).
  void (*column_sums[2])(ColumnSum what, const Panels& a, const Panels& b, int64_t j0, int64_t j1,
                         double* sums);
  void (*reflect[2])(const Reflections&);
  // Block rows [i0, i1) of the elementwise parts, in fp32 [0] or fp64 [1].
  void (*square_average[2])(const SquareAverage&, int64_t i0, int64_t i1);
  void (*adapted_length[2])(const AdaptedLength&, int64_t i0, int64_t i1);
  void (*adam_moments[2])(const AdamMoments&, int64_t i0, int64_t i1);
  void (*momentum[2])(const Momentum&, int64_t i0, int64_t i1);
  void (*variance_adaptation[2])(const VarianceAdaptation&, int64_t i0, int64_t i1);
  void (*sign_adaptation[2])(const SignAdaptation&, int64_t i0, int64_t i1);
  // Largest |x| of rows [r0, r1) as the bit pattern of an fp32 (fp64 for F64 input) number; a
  // pattern at or above that of infinity tells of a non-finite element.
  uint64_t (*max_abs_bits)(const Matrix&, int64_t r0, int64_t r1);
  // `rounds` rounds of independent multiply-adds on registers: what the ceiling is measured with.
  // Returns the floating-point operations done.
  double (*multiply_adds[kKinds])(int64_t rounds);
  // Rounds a part of a line of fp32 numbers, given as bits, at random to bfloat16.
  void (*round_line)(const uint32_t* x, uint32_t seed, uint32_t first, int64_t count, uint16_t* to);
  // Parts of an eigendecomposition in fp64: isa/tridiagonal.inl.
  void (*symmetric_times)(const Panels& a, const double* x, int64_t j0, int64_t j1, double* y);
  void (*add_lines)(int64_t lines, const double* x, int64_t pitch, const double* by, int64_t begin,
                    int64_t end, double* y);
  void (*dot_lines)(int64_t lines, const double* x, int64_t pitch, const double* y, int64_t begin,
                    int64_t end, double* dots);
  void (*secular_sums)(const double* d, const double* z2, int64_t begin, int64_t end, double origin,
                       double mu, double* value, double* slope);
  // Rows [r0, r1) of a product in place, of F32 [0] or F64 [1] numbers.
  void (*multiply_in_place[2])(const InPlace&, int64_t r0, int64_t r1);
  // Whether `rows` of this product need not be packed; null where they always have to be.
  bool (*reads_rows)(const Product&) = nullptr;
  // Words of the left image of a P x P block, 0 where a kind has none.
  int64_t image_words[kKinds] = {};
};

// The kernels in use: the best set that this processor and the cap (set_isa,
// SPECTRAL_KERNELS_CPU_ISA) allow.
const Kernels& kernels();

}  // namespace spectral_kernels::cpu
