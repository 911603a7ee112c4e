// Tensors as the launch functions take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "list.h"

namespace spectral_kernels::cuda {

void* stream_of(const at::Tensor& t);
void check_launch(int error, const char* op);
Type type_of(at::ScalarType type);

// Matrices of a batch.
int64_t leading(const at::Tensor& t);
// One entry for the batch, or one a matrix where the leading dimensions have no common stride; with
// the shorter side as rows, or as they are.
void append(std::vector<Entry>& entries, const at::Tensor& source, const at::Tensor& momentum,
            const at::Tensor& target, float scale, bool oriented = true);
// Gives every entry the number of its first matrix.
void number(std::vector<Entry>& entries);

int device_number(const at::Tensor& t);
int64_t shared_memory_of(const at::Tensor& t);
void check_not_double(const at::Tensor& t, const char* op);

}  // namespace spectral_kernels::cuda
