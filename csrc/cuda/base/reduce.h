// Reductions over a block, and over the blocks of a matrix in a fixed order.
#pragma once

#include "kernel_table.h"

namespace spectral_kernels::cuda {

// Shared memory of the reductions below: one number a warp, and the turn of a block.
template <int kThreads>
constexpr size_t kReduceBytes = (kThreads / 32 + 1) * sizeof(double);

DEVICE uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffffu; }

// The largest of every thread's value, in thread 0.
template <int kThreads>
DEVICE uint32_t largest_of_block(uint32_t most, uint32_t* warps) {
  for (int mask = 16; mask; mask >>= 1) most = larger(most, __shfl_xor_sync(~0u, most, mask));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / 32; w++) most = larger(most, warps[w]);
  return most;
}

// largest[0] <- max of itself and every thread's value: integers need no order.
template <int kThreads>
DEVICE void raise_largest(uint32_t most, uint32_t* warps, uint32_t* largest) {
  most = largest_of_block<kThreads>(most, warps);
  if (threadIdx.x == 0) atomicMax(largest, most);
}

// The sum over the block of every thread's value, the same in all threads; `warps` is free again
// after the next barrier.
template <int kThreads>
DEVICE double sum_of_block(double value, double* warps) {
  for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kThreads / 32; w++) value += warps[w];
  return value;
}

// True in whichever block of a matrix arrives last, which sees what the others have written;
// `arrived` is zero before and after.
DEVICE bool last_to_arrive(uint32_t* arrived, int64_t parts, int* turn) {
  if (threadIdx.x == 0) {
    __threadfence();
    *turn = int(atomicAdd(arrived, 1u));
    __threadfence();
  }
  __syncthreads();
  if (*turn + 1 != int(parts)) return false;
  if (threadIdx.x == 0) *arrived = 0;
  return true;
}

// The sum of what blocks left, in their order; `warps` as for sum_of_block.
template <int kThreads>
DEVICE double total_of(const double* shares, int64_t parts, double* warps) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) total += fresh(shares + i);
  return sum_of_block<kThreads>(total, warps);
}

// Leaves this block's share of a matrix's sum, and has the whole in the last block to arrive.
template <int kThreads>
DEVICE bool last_total(double share, double* shares, int64_t part, int64_t parts, uint32_t* arrived,
                       double* warps, double& total) {
  if (threadIdx.x == 0) shares[part] = share;
  if (!last_to_arrive(arrived, parts, reinterpret_cast<int*>(warps + kThreads / 32))) return false;
  total = total_of<kThreads>(shares, parts, warps);
  return true;
}

}  // namespace spectral_kernels::cuda
