// All inline PTX of the kernels, and what else nvcc and the host emulation spell differently.
// tests/cuda_emulation/emulation.h holds the same functions for g++.
#pragma once

#ifndef CUDA_EMULATION
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(128) unsigned char shared_[]; \
  T* name = reinterpret_cast<T*>(shared_)
// Of so many threads of a block, as its group number 0 or 1: all of them unless some load only.
#define BARRIER(group, threads) \
  asm volatile("bar.sync %0, %1;" ::"r"(1 + (group)), "n"(threads) : "memory")

namespace spectral_kernels::cuda {

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// D (16 x 8, fp32) += A (16 x 16) B (16 x 8). A macro, since an instruction is a literal.
#define MMA_OF(name, type)                                                            \
  DEVICE void name(float d[4], const uint32_t a[4], const uint32_t b[2]) {            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type               \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
MMA_OF(mma_bf16, "bf16")
MMA_OF(mma_f16, "f16")
#undef MMA_OF

// Four 8 x 8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix(uint32_t r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrix_transposed(uint32_t r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE uint32_t transpose_matrix(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// 16 bytes to shared memory, zeros if not `valid`; there after the group's wait.
DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Two floats rounded to nearest even, the first in the low half.
DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
DEVICE float2 unpack_f16(uint32_t w) {
  float2 f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(f.x), "=f"(f.y)
      : "r"(w));
  return f;
}
DEVICE float2 unpack_bf16(uint32_t w) {
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}
// What another block has written before this one, past the L1 cache, which may hold an older state.
template <class T>
DEVICE T fresh(const T* p) {
  return __ldcg(p);
}
// A counter that others raise meanwhile. With a fence behind it, what they had written before
// theirs is there.
DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t seen;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p) : "memory");
  return seen;
}
// 16 aligned bytes of global memory, by one instruction.
DEVICE uint4 load_words(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
DEVICE void store_words(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
// Asks for a line of 128 bytes to be brought to L2.
DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Returns when *p is at least that. What the thread that raised it had written before its fence is
// there then for this thread, and after a barrier for its block.
DEVICE void wait_for(const uint32_t* p, uint32_t least) {
  for (;;) {
    uint32_t seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p) : "memory");
    if (seen >= least) return;
    __nanosleep(100);
  }
}
// threadIdx.x, read anew: what follows from it would be kept in registers all through a loop that
// this stands in, and with several bodies in the loop they run out.
DEVICE int own_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
// a b, rounded: never a part of a fused multiply-add, whatever stands around it.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t u) { return __uint_as_float(u); }

}  // namespace spectral_kernels::cuda

#endif
