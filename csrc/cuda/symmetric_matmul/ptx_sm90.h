// PTX that only sm_90a has: mbarriers, TMA and wgmma. tests/cuda_emulation/sm90.h holds the same
// functions for g++.
#pragma once

#include "../base/ptx.h"

#ifndef CUDA_EMULATION

namespace spectral_kernels::cuda {

DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces bytes that TMA will write.
DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of a tensor of three dimensions to shared memory; outside the tensor are zeros.
DEVICE void tma_load(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

template <int kCount>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define WGMMA(type)                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
               " "                                                          \
               "{%0, %1, %2, %3, %4, %5, %6, %7, "                          \
               "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
               "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
               "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
               "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
               "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
               "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
               "%56, %57, %58, %59, %60, %61, %62, %63}, "                  \
               "%64, %65, 1, 1, 1, %66, %67;"                               \
               : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)          \
               : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB))

// D (64 x 128, fp32, over four warps) += A (64 x 16) B (16 x 128), both in shared memory.
template <bool kF16, int kTransposedA, int kTransposedB>
DEVICE void wgmma(float* d, uint64_t a, uint64_t b) {
  if (kF16)
    WGMMA("f16");
  else
    WGMMA("bf16");
}

#undef WGMMA
#undef SIXTEEN
#undef FOUR

}  // namespace spectral_kernels::cuda

#endif
