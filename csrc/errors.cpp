#include "errors.h"

#include <pybind11/pybind11.h>

namespace spectral_kernels {
namespace {

// torch calls operators from pybind11, which asks such exceptions for the Python error that they
// stand for.
class PYBIND11_EXPORT_EXCEPTION NotImplemented : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_NotImplementedError, what()); }
};

}  // namespace

void refuse(Refusal kind, const std::string& message) {
  switch (kind) {
    case Refusal::kValue:
      throw pybind11::value_error(message);
    case Refusal::kType:
      throw pybind11::type_error(message);
    case Refusal::kNotImplemented:
      throw NotImplemented(message);
    case Refusal::kRuntime:
      break;
  }
  throw std::runtime_error(message);
}

}  // namespace spectral_kernels
