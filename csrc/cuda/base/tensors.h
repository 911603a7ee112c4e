// Tensors as the launch functions take them.
#pragma once

#include <initializer_list>
#include <vector>

#include "../../tensor.h"
#include "list_step.h"

struct DeviceGuardOpaque;  // torch's

namespace spectral_kernels::cuda {

// The device of the calling thread while this lives; the emulation has none to change.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardOpaque* guard_ = nullptr;
};

void* stream_of(const Tensor& t);
void check_launch(int error, const char* op);
Type type_of(ScalarType type);

// Matrices of a batch.
int64_t leading(const Tensor& t);
Tensor matrix_of(const Tensor& t, int64_t index);
// Whether the leading dimensions of each have one stride together.
bool common_strides(std::initializer_list<Tensor> tensors);
// The matrices of `t` from number `index` on, with the columns as rows if not `wide`. The batch has
// no stride where leading dimensions have none in common; undefined: no data.
Matrices matrices_from(const Tensor& t, int64_t index, bool wide = true);
// One entry for the batch, or one a matrix where the leading dimensions have no common stride; with
// the shorter side as rows, or as they are.
void append(std::vector<Entry>& entries, const Tensor& source, const Tensor& momentum,
            const Tensor& target, float scale, bool oriented = true);
// Gives every entry the number of its first matrix.
void number(std::vector<Entry>& entries);

int device_number(const Tensor& t);
int64_t shared_memory_of(const Tensor& t);
void check_not_double(const Tensor& t, const char* op);

// The counter of matrices that are numbered from `first` on.
Counter counter_of(const Tensor& steps, int64_t first, int64_t count);

// For nonfinite="raise", which waits for the device: raises if a gradient or a momentum is not
// finite. `largest` has a zero for every matrix of the list, in its order, and is overwritten.
void raise_nonfinite(const std::vector<Entry>& entries, TensorList params,
                     const char* momentum_name, const Tensor& largest, const char* op);

// The same for one list of states or parameters; those without elements are left out.
void raise_nonfinite(TensorList list, const char* name, const char* op);

}  // namespace spectral_kernels::cuda
