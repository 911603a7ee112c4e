#include "tensor.h"

#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <string>

#include "boxing.h"

namespace spectral_kernels {
namespace {

// Both ways between torch's numbers of types, which may differ from those of the headers that this
// was compiled with.
struct Types {
  struct Pair {
    ScalarType type;
    int32_t number;
  };
  std::array<ScalarType, 128> types;
  std::array<Pair, 19> pairs;

  Types()
      : pairs{{{ScalarType::Byte, aoti_torch_dtype_uint8()},
               {ScalarType::Char, aoti_torch_dtype_int8()},
               {ScalarType::Short, aoti_torch_dtype_int16()},
               {ScalarType::Int, aoti_torch_dtype_int32()},
               {ScalarType::Long, aoti_torch_dtype_int64()},
               {ScalarType::UInt16, aoti_torch_dtype_uint16()},
               {ScalarType::UInt32, aoti_torch_dtype_uint32()},
               {ScalarType::UInt64, aoti_torch_dtype_uint64()},
               {ScalarType::Half, aoti_torch_dtype_float16()},
               {ScalarType::BFloat16, aoti_torch_dtype_bfloat16()},
               {ScalarType::Float, aoti_torch_dtype_float32()},
               {ScalarType::Double, aoti_torch_dtype_float64()},
               {ScalarType::ComplexHalf, aoti_torch_dtype_complex32()},
               {ScalarType::ComplexFloat, aoti_torch_dtype_complex64()},
               {ScalarType::ComplexDouble, aoti_torch_dtype_complex128()},
               {ScalarType::Bool, aoti_torch_dtype_bool()},
               {ScalarType::Float8_e5m2, aoti_torch_dtype_float8_e5m2()},
               {ScalarType::Float8_e4m3fn, aoti_torch_dtype_float8_e4m3fn()},
               {ScalarType::Float8_e4m3fnuz, aoti_torch_dtype_float8_e4m3fnuz()}}} {
    types.fill(ScalarType::Undefined);
    for (const Pair& pair : pairs) types.at(size_t(pair.number)) = pair.type;
  }
};

const Types& all_types() {
  static const Types types;
  return types;
}

template <class T>
T asked(AOTITorchError (*question)(AtenTensorHandle, T*), AtenTensorHandle tensor) {
  T answer{};
  check_torch(question(tensor, &answer), "a question about a tensor");
  return answer;
}

std::vector<int64_t> contiguous_strides(IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

}  // namespace

ScalarType type_of_number(int32_t number) {
  const auto& types = all_types().types;
  return number >= 0 && size_t(number) < types.size() ? types[size_t(number)]
                                                      : ScalarType::Undefined;
}

int32_t number_of_type(ScalarType type) {
  for (const Types::Pair& pair : all_types().pairs)
    if (pair.type == type) return pair.number;
  throw TorchError(text_of("torch has no number for the type ", type));
}

bool Device::is_cpu() const { return type == aoti_torch_device_type_cpu(); }

std::ostream& operator<<(std::ostream& stream, Device device) {
  const struct {
    int32_t type;
    const char* name;
  } known[] = {{aoti_torch_device_type_cpu(), "cpu"},
               {aoti_torch_device_type_cuda(), "cuda"},
               {aoti_torch_device_type_meta(), "meta"},
               {aoti_torch_device_type_xpu(), "xpu"},
               {aoti_torch_device_type_mps(), "mps"},
               {aoti_torch_device_type_privateuse1(), "privateuseone"}};
  const auto found = std::find_if(std::begin(known), std::end(known),
                                  [&](const auto& each) { return each.type == device.type; });
  if (found == std::end(known))
    stream << "device type " << device.type;
  else
    stream << found->name;
  if (device.index >= 0) stream << ':' << device.index;
  return stream;
}

bool Layout::strided() const { return number == aoti_torch_layout_strided(); }

std::ostream& operator<<(std::ostream& stream, Layout layout) {
  const struct {
    int32_t number;
    const char* name;
  } known[] = {
      {aoti_torch_layout_strided(), "Strided"},      {aoti_torch_layout_sparse_coo(), "Sparse"},
      {aoti_torch_layout_sparse_csr(), "SparseCsr"}, {aoti_torch_layout_sparse_csc(), "SparseCsc"},
      {aoti_torch_layout_sparse_bsr(), "SparseBsr"}, {aoti_torch_layout_sparse_bsc(), "SparseBsc"},
      {aoti_torch_layout__mkldnn(), "Mkldnn"},       {aoti_torch_layout_jagged(), "Jagged"}};
  for (const auto& each : known)
    if (each.number == layout.number) return stream << each.name;
  return stream << "number " << layout.number;
}

Tensor::Record::Record(AtenTensorOpaque* owned) : handle(owned) {
  const int64_t dim = asked(&aoti_torch_get_dim, handle);
  numel = asked(&aoti_torch_get_numel, handle);
  sizes = {asked(&aoti_torch_get_sizes, handle), size_t(dim)};
  layout = {asked(&aoti_torch_get_layout, handle)};
  if (layout.strided()) strides = {asked(&aoti_torch_get_strides, handle), size_t(dim)};
  type_number = asked(&aoti_torch_get_dtype, handle);
  dtype = type_of_number(type_number);
  device = {asked(&aoti_torch_get_device_type, handle),
            asked(&aoti_torch_get_device_index, handle)};
}

Tensor::Record::~Record() { aoti_torch_delete_tensor_object(handle); }

Tensor::Tensor(AtenTensorOpaque* handle) {
  struct Delete {
    void operator()(AtenTensorOpaque* p) const { aoti_torch_delete_tensor_object(p); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> owned(handle);
  if (!asked(&aoti_torch_is_defined, handle)) return;
  record_ = std::make_shared<const Record>(handle);
  owned.release();
}

size_t Tensor::element_size() const { return aoti_torch_dtype_element_size(record_->type_number); }

bool Tensor::is_contiguous() const { return asked(&aoti_torch_is_contiguous, record_->handle); }

void* Tensor::data_ptr() const { return asked(&aoti_torch_get_data_ptr, record_->handle); }

const void* Tensor::const_data_ptr() const {
  return asked(&torch_get_const_data_ptr, record_->handle);
}

void Tensor::check_holds(ScalarType type) const {
  CHECK_RUNTIME(scalar_type() == type, "expected scalar type ", type, " but found ", scalar_type());
}

const Tensor& Tensor::copy_(const Tensor& from) const {
  check_torch(aoti_torch_copy_(handle(), from.handle(), /*non_blocking=*/0), "copy_");
  return *this;
}

Tensor Tensor::unsqueeze(int64_t d) const {
  return called<Tensor>("aten::unsqueeze", "", *this, d);
}

Tensor Tensor::as_strided(IntArrayRef sizes, IntArrayRef strides, int64_t offset) const {
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(handle(), int64_t(sizes.size()), sizes.data(),
                                             strides.data(), offset, &view),
              "as_strided");
  return Tensor(view);
}

// The emulation of CUDA fills what it allocates with NaN where a test asks for that, so that a read
// of something unwritten shows.
#ifdef SPECTRAL_KERNELS_EMULATION
static Tensor fresh(AtenTensorHandle made) {
  const Tensor tensor(made);
  if (std::getenv("EMULATION_POISON") != nullptr)
    std::memset(tensor.data_ptr(), 0xff, size_t(tensor.numel()) * tensor.element_size());
  return tensor;
}
#else
static Tensor fresh(AtenTensorHandle made) { return Tensor(made); }
#endif

Tensor empty(IntArrayRef sizes, const Tensor& like, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  const Device device = like.device();
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                       number_of_type(dtype), device.type, device.index, &made),
              "empty");
  return fresh(made);
}

Tensor empty_with_strides(const Tensor& like) {
  AtenTensorHandle made = nullptr;
  const Device device = like.device();
  check_torch(aoti_torch_empty_strided(like.dim(), like.sizes().data(), like.strides().data(),
                                       number_of_type(like.scalar_type()), device.type,
                                       device.index, &made),
              "empty");
  return Tensor(made);
}

Tensor zeros(IntArrayRef sizes, const Tensor& like, ScalarType dtype) {
  const Tensor made = empty(sizes, like, dtype);
  check_torch(aoti_torch_zero_(made.handle()), "zero_");
  return made;
}

Tensor from_blob(void* data, IntArrayRef sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_create_tensor_from_blob(data, int64_t(sizes.size()), sizes.data(),
                                                 strides.data(), 0, number_of_type(dtype),
                                                 aoti_torch_device_type_cpu(), -1, &made),
              "from_blob");
  return Tensor(made);
}

int torch_threads() {
  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "get_num_threads");
  return int(threads);
}

void torch_parallel(int64_t jobs, const std::function<void(int64_t)>& body) {
  // What a C function calls may not throw through it.
  struct Section {
    const std::function<void(int64_t)>& body;
    std::mutex mutex;
    std::exception_ptr first;
  } section{body, {}, nullptr};
  const ParallelFunc call = [](int64_t begin, int64_t end, void* context) {
    Section& section = *static_cast<Section*>(context);
    try {
      for (int64_t i = begin; i < end; i++) section.body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(section.mutex);
      if (!section.first) section.first = std::current_exception();
    }
  };
  constexpr int64_t kOneEach = 1;
  check_torch(torch_parallel_for(0, jobs, kOneEach, call, &section), "parallel_for");
  if (section.first) std::rethrow_exception(section.first);
}

}  // namespace spectral_kernels
