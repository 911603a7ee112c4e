#include "tensors.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

#include "device.h"
#include "torch_ops.h"

namespace spectral_kernels::cuda {

DeviceGuard::DeviceGuard(Device device) {
  if (!device.is_cpu())
    check_torch(aoti_torch_create_device_guard(device.index, &guard_), "a device guard");
}

DeviceGuard::~DeviceGuard() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
}

// Where torch has a CUDA part it is loaded already, and gives its streams away. It is not linked: a
// torch without one can load this library too.
void* stream_of(const Tensor& t) {
  const Device device = t.device();
  if (device.is_cpu()) return nullptr;  // the emulation
  using Current = AOTITorchError(int32_t device, void** stream);
  static Current* const current = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Current*>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  CHECK_RUNTIME(current != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  check_torch(current(device.index, &stream), "the current stream");
  return stream;
}

void check_launch(int error, const char* op) {
  CHECK_RUNTIME(error == 0, op, ": a CUDA kernel could not be launched: ", error_text(error));
}

Tensor on_cpu(const Tensor& x) {
  const std::vector<int64_t> strides = x.strides().vec();
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_empty_strided(x.dim(), x.sizes().data(), strides.data(),
                                       number_of_type(x.scalar_type()),
                                       aoti_torch_device_type_cpu(), -1, &made),
              "empty");
  const Tensor copy(made);
  return copy.copy_(x);
}

void fill(const Tensor& x, double value) {
  check_torch(aoti_torch_aten_fill__Scalar(x.handle(), value), "fill_");
}

Tensor difference(const Tensor& a, const Tensor& b, double factor) {
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_aten_subtract_Tensor(a.handle(), b.handle(), factor, &made), "subtract");
  return Tensor(made);
}

double number_of(const Tensor& x) {
  const Tensor wide = on_cpu(converted(x, kDouble));
  return *wide.const_data_ptr<double>();
}

Type type_of(ScalarType type) {
  switch (type) {
    case kBFloat16:
      return Type::kBF16;
    case kHalf:
      return Type::kF16;
    case kDouble:
      return Type::kF64;
    default:
      return Type::kF32;
  }
}

int64_t leading(const Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 0; d + 2 < t.dim(); d++) count *= t.size(d);
  return count;
}

Tensor matrix_of(const Tensor& t, int64_t index) {
  Tensor matrix = t;
  while (matrix.dim() > 2) {
    int64_t each = 1;
    for (int64_t d = 1; d + 2 < matrix.dim(); d++) each *= matrix.size(d);
    matrix = select(matrix, 0, index / each);
    index %= each;
  }
  return matrix;
}

namespace {

// The one stride of all leading dimensions together; false if there is none.
bool batch_stride(const Tensor& t, int64_t& stride) {
  stride = 0;
  int64_t expected = -1;
  for (int64_t d = t.dim() - 3; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (expected < 0)
      stride = t.stride(d);
    else if (t.stride(d) != expected)
      return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

}  // namespace

bool common_strides(std::initializer_list<Tensor> tensors) {
  int64_t stride;
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const Tensor& t) { return !t.defined() || batch_stride(t, stride); });
}

Matrices matrices_from(const Tensor& t, int64_t index, bool wide) {
  if (!t.defined()) return {};
  Matrices m;
  if (!batch_stride(t, m.batch)) m.batch = 0;
  int64_t offset = 0;
  for (int64_t d = t.dim() - 3; d >= 0; d--) {
    offset += index % t.size(d) * t.stride(d);
    index /= t.size(d);
  }
  m.data = static_cast<char*>(t.data_ptr()) + offset * int64_t(t.element_size());
  m.type = type_of(t.scalar_type());
  m.row = t.stride(wide ? -2 : -1);
  m.column = t.stride(wide ? -1 : -2);
  return m;
}

void append(std::vector<Entry>& entries, const Tensor& source, const Tensor& momentum,
            const Tensor& target, float scale, bool oriented) {
  if (source.numel() == 0) return;
  const bool wide = !oriented || source.size(-2) <= source.size(-1);
  const bool common = common_strides({source, momentum, target});
  const int64_t count = leading(source);
  for (int64_t i = 0; i < count; i += common ? count : 1) {
    Entry e;
    e.source = matrices_from(source, i, wide);
    e.momentum = matrices_from(momentum, i, wide);
    e.target = matrices_from(target, i, wide);
    e.rows = int(source.size(wide ? -2 : -1));
    e.columns = source.size(wide ? -1 : -2);
    e.count = common ? count : 1;
    e.scale = scale;
    entries.push_back(e);
  }
}

void number(std::vector<Entry>& entries) {
  for (size_t i = 1; i < entries.size(); i++)
    entries[i].first = entries[i - 1].first + entries[i - 1].count;
}

int device_number(const Tensor& t) { return std::max(0, int(t.device().index)); }

int64_t shared_memory_of(const Tensor& t) { return shared_memory_limit(device_number(t)); }

void check_not_double(const Tensor& t, const char* op) {
  CHECK_IMPLEMENTED(t.scalar_type() != kDouble, op,
                    ": the CUDA C++ kernels compute in fp32 and 16 bits, not in fp64");
}

Counter counter_of(const Tensor& steps, int64_t first, int64_t count) {
  Counter c;
  c.first = first;
  c.count = count;
  c.steps = steps.data_ptr();
  c.type = type_of(steps.scalar_type());
  c.integer = steps.scalar_type() == kLong;
  c.each = steps.numel() > 1;
  return c;
}

void raise_nonfinite(const std::vector<Entry>& entries, TensorList params,
                     const char* momentum_name, const Tensor& largest, const char* op) {
  for (const Of of : {Of::kSource, Of::kMomentum}) {
    check_launch(launch_largest(entries, of, reinterpret_cast<uint32_t*>(largest.data_ptr()),
                                stream_of(largest)),
                 op);
    const Tensor found = on_cpu(largest);
    const int32_t* bits = found.const_data_ptr<int32_t>();
    for (size_t i = 0; i < params.size(); i++)
      for (int64_t j = 0; params[i].numel() > 0 && j < leading(params[i]); j++)
        CHECK_VALUE(uint32_t(*bits++) < kInfinityBits, of == Of::kSource ? "grads" : momentum_name,
                    "[", i, "] has a non-finite element (matrix ", j, ")");
  }
}

void raise_nonfinite(TensorList list, const char* name, const char* op) {
  for (size_t i = 0; i < list.size(); i++) {
    if (list[i].numel() == 0) continue;
    std::vector<Entry> entries;
    append(entries, list[i], {}, list[i], 1, false);
    number(entries);
    const Tensor largest = zeros({leading(list[i])}, list[i], kInt);
    check_launch(
        launch_largest(entries, Of::kSource, reinterpret_cast<uint32_t*>(largest.data_ptr()),
                       stream_of(largest)),
        op);
    const Tensor found = on_cpu(largest);
    for (int64_t j = 0; j < leading(list[i]); j++)
      CHECK_VALUE(uint32_t(found.const_data_ptr<int32_t>()[j]) < kInfinityBits, name, "[", i,
                  "] has a non-finite element (matrix ", j, ")");
  }
}

}  // namespace spectral_kernels::cuda
