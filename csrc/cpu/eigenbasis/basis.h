// Eigenbases of symmetric matrices, for the operators and for the steps that stand on them.
#pragma once

#include <cstdint>
#include <vector>

#include "../product.h"
#include "../tiles.h"

namespace spectral_kernels::cpu {

// vectors = eigenvectors of (A + Aᵀ) / 2 in columns, values descending. False, with nothing
// written, for non-finite input or where it does not converge.
bool eigenbasis(const Matrix& a, std::vector<double>& values, const Matrix& vectors, int threads);
size_t eigenbasis_bytes(int64_t n);

// One round of orthogonal iteration on a finite q and a (see reference/eigenbasis.py). `q_new` may
// be q. values[j] and order[j] belong to the old columns; with `sort` the new column k follows
// order[k].
struct Refresh {
  std::vector<double> values;
  std::vector<int64_t> order;
};
Refresh refresh_eigenbasis(const Matrix& q, const Matrix& a, bool sort, const Matrix& q_new,
                           int threads);

double refresh_work(int64_t n);
// Scratch memory of refresh_eigenbasis.
size_t refresh_bytes(int64_t n, DType dtype);

}  // namespace spectral_kernels::cpu
