// Eight elements in a row, in words of 16 bytes where they lie so. The type is a parameter: a loop
// asks for it once, not element by element.
#pragma once

#include <type_traits>

#include "kernel_table.h"

namespace spectral_kernels::cuda {

template <Type kType>
using TypeConstant = std::integral_constant<Type, kType>;

// go(TypeConstant) of a type that is known at run time.
template <class Go>
DEVICE void with_type(Type type, Go go) {
  switch (type) {
    case Type::kBF16:
      return go(TypeConstant<Type::kBF16>());
    case Type::kF16:
      return go(TypeConstant<Type::kF16>());
    case Type::kF64:
      return go(TypeConstant<Type::kF64>());
    default:
      return go(TypeConstant<Type::kF32>());
  }
}

HOST_DEVICE int bytes_of(Type type) { return type == Type::kF64 ? 8 : type == Type::kF32 ? 4 : 2; }

// Whether eight elements from every multiple of eight on are whole words, with elements `fast`
// apart in what is `slow` apart.
DEVICE bool in_words(const Matrices& m, int64_t slow, int64_t fast) {
  const int64_t elements = 16 / bytes_of(m.type);
  return fast == 1 && (slow | m.batch) % elements == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// From element `at` on, which begins a word.
template <Type kType>
DEVICE void load_eight(const void* data, int64_t at, float (&x)[8]) {
  const char* from = static_cast<const char*>(data) + at * bytes_of(kType);
  if constexpr (kType == Type::kF64) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const double2 v = reinterpret_cast<const double2*>(from)[i];
      x[2 * i] = float(v.x);
      x[2 * i + 1] = float(v.y);
    }
  } else if constexpr (kType == Type::kF32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = load_words(from + 16 * i);
      const uint32_t all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; k++) x[4 * i + k] = float_of(all[k]);
    }
  } else {
    const uint4 v = load_words(from);
    const uint32_t all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 f = kType == Type::kF16 ? unpack_f16(all[k]) : unpack_bf16(all[k]);
      x[2 * k] = f.x;
      x[2 * k + 1] = f.y;
    }
  }
}

template <Type kType>
DEVICE void store_eight(void* data, int64_t at, const float (&x)[8]) {
  char* to = static_cast<char*>(data) + at * bytes_of(kType);
  if constexpr (kType == Type::kF64) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      reinterpret_cast<double2*>(to)[i] = make_double2(double(x[2 * i]), double(x[2 * i + 1]));
  } else if constexpr (kType == Type::kF32) {
#pragma unroll
    for (int i = 0; i < 8; i += 4)
      store_words(to + 4 * i, make_uint4(bits_of(x[i]), bits_of(x[i + 1]), bits_of(x[i + 2]),
                                         bits_of(x[i + 3])));
  } else {
    uint32_t all[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
      all[k] = kType == Type::kF16 ? pack_f16(x[2 * k], x[2 * k + 1])
                                   : pack_bf16(x[2 * k], x[2 * k + 1]);
    store_words(to, make_uint4(all[0], all[1], all[2], all[3]));
  }
}

}  // namespace spectral_kernels::cuda
