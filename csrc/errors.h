// How a function refuses what it was given: an exception that Python sees as the class it names.
// Operators are called through torch's boxed interface, which lets exceptions through.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace spectral_kernels {

enum class Refusal { kValue, kType, kNotImplemented, kRuntime };

[[noreturn]] void refuse(Refusal kind, const std::string& message);

// A call into torch that failed.
struct TorchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Everything as a stream writes it, one after the other.
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return std::move(stream).str();
}

}  // namespace spectral_kernels

#define SPECTRAL_KERNELS_CHECK(kind, condition, ...)                        \
  do {                                                                      \
    if (__builtin_expect(!(condition), 0))                                  \
      ::spectral_kernels::refuse(::spectral_kernels::Refusal::kind,         \
                                 ::spectral_kernels::text_of(__VA_ARGS__)); \
  } while (false)

// ValueError, TypeError, NotImplementedError or RuntimeError unless the condition holds, with the
// other arguments as its text.
#define CHECK_VALUE(condition, ...) SPECTRAL_KERNELS_CHECK(kValue, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) SPECTRAL_KERNELS_CHECK(kType, condition, __VA_ARGS__)
#define CHECK_IMPLEMENTED(condition, ...) \
  SPECTRAL_KERNELS_CHECK(kNotImplemented, condition, __VA_ARGS__)
#define CHECK_RUNTIME(condition, ...) SPECTRAL_KERNELS_CHECK(kRuntime, condition, __VA_ARGS__)
