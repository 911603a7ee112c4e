// The emulated instructions against plain arithmetic, and faults that the emulation must notice.
#include <cstring>

#include "emulation.h"

using namespace spectral_kernels::cuda;

namespace {

constexpr int kRows = 16, kColumns = 8, kInner = 16;
float a[kRows][kInner], b[kInner][kColumns], d[2][kRows][kColumns];

void multiply_kernel() {
  const int lane = int(threadIdx.x), group = lane / 4, pair = lane % 4;
  DYNAMIC_SHARED(uint16_t, shared);
  for (int f16 = 0; f16 < 2; f16++) {
    const auto encode = f16 != 0 ? emulation::to_f16 : emulation::to_bf16;
    uint16_t* columns = shared + kRows * kInner;  // B by columns
    for (int i = lane; i < kRows * kInner; i += 32)
      shared[i] = uint16_t(encode(a[i / kInner][i % kInner]));
    for (int i = lane; i < kInner * kColumns; i += 32)
      columns[i] = uint16_t(encode(b[i % kInner][i / kInner]));
    __syncthreads();
    uint32_t x[4], y[4], mirrored[4];
    load_matrix(x, shared + lane % 16 * 16 + lane / 16 * 8);
    load_matrix(y, columns + lane % 8 * 16 + lane / 8 % 2 * 8);
    load_matrix_transposed(mirrored, shared + lane % 16 * 16 + lane / 16 * 8);
    for (int i = 0; i < 4; i++)
      if (mirrored[i] != transpose_matrix(x[i])) emulation::die("the two transpositions differ");
    float out[4] = {};
    (f16 != 0 ? mma_f16 : mma_bf16)(out, x, y);
    for (int i = 0; i < 4; i++) d[f16][group + i / 2 * 8][pair * 2 + i % 2] = out[i];
    __syncthreads();
  }
}

bool multiplies() {
  std::mt19937 random(1);
  const auto draw = [&] { return float(int(random() % 257) - 128) / 16.f; };  // exact in both types
  for (auto& row : a)
    for (float& x : row) x = draw();
  for (auto& row : b)
    for (float& x : row) x = draw();
  LAUNCH(multiply_kernel, dim3(1), dim3(32), 1024, nullptr, );
  for (const auto& result : d)
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < kColumns; j++) {
        double sum = 0;
        for (int k = 0; k < kInner; k++) sum += double(a[i][k]) * double(b[k][j]);
        if (double(result[i][j]) != sum) return false;
      }
  return true;
}

bool converts() {
  for (uint32_t h = 0; h < 0x7c00; h++) {
    const float f = emulation::from_f16(h);
    if (emulation::to_f16(f) != h || emulation::to_f16(-f) != (h | 0x8000)) return false;
    if (emulation::from_f16(h | 0x8000) != -f) return false;
    const float next = emulation::from_f16(h + 1), middle = f + (next - f) / 2;
    if (h + 1 < 0x7c00 && emulation::to_f16(middle) != h + (h & 1)) return false;  // ties to even
  }
  if (!std::isinf(emulation::from_f16(0x7c00)) || !std::isnan(emulation::from_f16(0x7c01)))
    return false;
  return emulation::to_f16(65520.f) == 0x7c00 && emulation::to_f16(65519.f) == 0x7bff;
}

// Thread 0 of warp 0 reads what the last warp writes.
void handover_kernel(float* out, bool with_barrier) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = float(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

bool notices_a_missing_barrier() {
  const auto right = [](bool with_barrier, int order) {
    emulation::set_order(order);
    float out[64];
    float* to = out;
    LAUNCH(handover_kernel, dim3(1), dim3(64), 256, nullptr, to, with_barrier);
    emulation::set_order(0);
    for (int i = 0; i < 64; i++)
      if (!(out[i] == float((i + 32) % 64))) return false;
    return true;
  };
  for (const int order : {0, 1, 2})
    if (!right(true, order) || right(false, order)) return false;
  return true;
}

void divergent_kernel() {
  if (threadIdx.x < 32) __syncthreads();
  uint32_t r[4];
  load_matrix(r, nullptr);
}
void misaligned_kernel() {
  DYNAMIC_SHARED(char, shared);
  uint32_t r[4];
  load_matrix(r, shared + 8);
}
void outside_kernel() {
  DYNAMIC_SHARED(char, shared);
  uint32_t r[4];
  load_matrix(r, shared + 256);
}
void unwaited_kernel(const char* from) {
  DYNAMIC_SHARED(char, shared);
  copy_async(shared, from, true);
  copy_async_commit();
}

// Block 0 waits for block 1.
void waiting_kernel(uint32_t* raised, float* out) {
  if (threadIdx.x == 0 && blockIdx.x == 0) wait_for(raised, 1);
  if (threadIdx.x == 0 && blockIdx.x == 1) atomicAdd(raised, 1u);
  __syncthreads();
  out[blockIdx.x] = 1;
}

bool runs_blocks_together(int residents) {
  uint32_t raised = 0;
  float out[2] = {};
  uint32_t* flag = &raised;
  float* to = out;
  emulation::residents = residents;
  try {
    LAUNCH(waiting_kernel, dim3(2), dim3(64), 0, nullptr, flag, to);
  } catch (const std::runtime_error&) {
  }
  emulation::residents = 1;
  return out[0] == 1 && out[1] == 1;
}

template <class Kernel, class... Arguments>
bool fails(Kernel kernel, Arguments... arguments) {
  try {
    LAUNCH(kernel, dim3(1), dim3(64), 256, nullptr, arguments...);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

void early_read_kernel(const float* from, float* out) {
  DYNAMIC_SHARED(float, shared);
  copy_async(shared + threadIdx.x * 4, from, true);
  copy_async_commit();
  out[0] = shared[threadIdx.x * 4];
  copy_async_wait<0>();
  out[1] = shared[threadIdx.x * 4];
}

bool keeps_copies_until_the_wait() {
  alignas(16) float source[4] = {1, 2, 3, 4};
  float out[2];
  const float* from = source;
  float* to = out;
  LAUNCH(early_read_kernel, dim3(1), dim3(32), 512, nullptr, from, to);
  return std::isnan(out[0]) && out[1] == 1;
}

bool truncates() {
  for (float& x : a[0]) x = 1;
  for (auto& row : b) row[0] = 1.0f / 3;
  emulation::set_truncation(true);
  LAUNCH(multiply_kernel, dim3(1), dim3(32), 1024, nullptr, );
  emulation::set_truncation(false);
  const double exact = 16 * double(emulation::from_bf16(emulation::to_bf16(1.0f / 3)));
  return double(d[0][0][0]) <= exact && exact - double(d[0][0][0]) < 1e-5;
}

}  // namespace

int main() {
  alignas(16) const char bytes[16] = {};
  const char* from = bytes;
  const struct {
    const char* what;
    bool passed;
  } checks[] = {
      {"mma, ldmatrix and movmatrix", multiplies()},
      {"conversions to and from fp16", converts()},
      {"a missing barrier", notices_a_missing_barrier()},
      {"a barrier that half of the threads reach", fails(divergent_kernel)},
      {"a misaligned ldmatrix", fails(misaligned_kernel)},
      {"an ldmatrix outside shared memory", fails(outside_kernel)},
      {"a cp.async without wait", fails(unwaited_kernel, from)},
      {"a read before the wait", keeps_copies_until_the_wait()},
      {"rounding toward zero", truncates()},
      {"a wait for a block at work", runs_blocks_together(2)},
      {"a wait for a block that has not begun", !runs_blocks_together(1)},
  };
  int failures = 0;
  for (const auto& check : checks)
    if (!check.passed) {
      printf("FAILED: %s\n", check.what);
      failures++;
    }
  printf("%d of %zu checks passed\n", int(std::size(checks)) - failures, std::size(checks));
  return failures;
}
