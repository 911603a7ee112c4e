// PTX that only sm_90a has: clusters, mbarriers, TMA and wgmma. tests/cuda_emulation/sm90.h holds
// the same functions for g++.
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

// Arrives at the barrier that has this place in block number `rank` of the cluster.
DEVICE void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Of all threads of a cluster.
#define CLUSTER_BARRIER() \
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory")

// The next launch may begin, up to where it waits for what this one writes.
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEVICE void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor of three dimensions to shared memory; outside the tensor are zeros.
DEVICE void tma_load(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same to this place in both blocks of a cluster, which each have their barrier.
DEVICE void tma_load_both(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(uint16_t(3))
      : "memory");
}

// From shared memory to a box, without what is outside of the tensor. The thread that has stored
// waits until all but its last kLeft groups have been read.
DEVICE void tma_store(const void* map, const void* from, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kLeft>
DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
// What this thread has stored in shared memory is seen by TMA.
DEVICE void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrix(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}
DEVICE void store_matrix_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
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
#define WGMMA(type)                                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                   \
               " "                                                                            \
               "{%0, %1, %2, %3, %4, %5, %6, %7, "                                            \
               "%8, %9, %10, %11, %12, %13, %14, %15, "                                       \
               "%16, %17, %18, %19, %20, %21, %22, %23, "                                     \
               "%24, %25, %26, %27, %28, %29, %30, %31, "                                     \
               "%32, %33, %34, %35, %36, %37, %38, %39, "                                     \
               "%40, %41, %42, %43, %44, %45, %46, %47, "                                     \
               "%48, %49, %50, %51, %52, %53, %54, %55, "                                     \
               "%56, %57, %58, %59, %60, %61, %62, %63, "                                     \
               "%64, %65, %66, %67, %68, %69, %70, %71, "                                     \
               "%72, %73, %74, %75, %76, %77, %78, %79, "                                     \
               "%80, %81, %82, %83, %84, %85, %86, %87, "                                     \
               "%88, %89, %90, %91, %92, %93, %94, %95, "                                     \
               "%96, %97, %98, %99, %100, %101, %102, %103, "                                 \
               "%104, %105, %106, %107, %108, %109, %110, %111, "                             \
               "%112, %113, %114, %115, %116, %117, %118, %119, "                             \
               "%120, %121, %122, %123, %124, %125, %126, %127}, "                            \
               "%128, %129, 1, 1, 1, %130, %131;"                                             \
               : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), \
                 SIXTEEN(96), SIXTEEN(112)                                                    \
               : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB))

// D (64 x 256, fp32, over four warps) += A (64 x 16) B (16 x 256), both in shared memory.
template <bool kF16, int kTransposedA, int kTransposedB>
DEVICE void wgmma(float* d, uint64_t a, uint64_t b) {
  if (kF16)
    WGMMA("f16");
  else
    WGMMA("bf16");
}

// Nothing may copy sums between two of these but products: the compiler does not know that they are
// at work until a wait.
template <int kCount>
DEVICE void fence_sums(float* d) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#undef WGMMA
#undef SIXTEEN
#undef FOUR

}  // namespace spectral_kernels::cuda

#endif
