// What only sm_90a has, for the emulation: mbarriers, TMA and its tensor maps, wgmma, registers
// that warpgroups hand to one another.
//
// Copies and products are asynchronous: they happen as early as they may, as late as they may (a
// copy when nobody can go on without it, a product at its wait) or in between at random, see
// `delivery`. Until then the place of a copy, and the sums of a product, are NaN. Descriptors and
// tensor maps are read bit by bit, swizzled addresses are computed as the hardware does.
//
// What it finds beyond what the rest does: wrong descriptors, maps, coordinates and swizzles;
// stages that are refilled while they are read, or read before they are full; wrong parities,
// arrivals and byte counts; sums that are touched while products are in flight; registers that do
// not suffice.
#pragma once

#include <deque>
#include <map>
#include <set>

#include "threads.h"

#define __CUDA_ARCH_FEAT_SM90_ALL 1

struct alignas(64) CUtensorMap {
  const char* base = nullptr;
  int64_t sizes[3] = {}, strides[3] = {};  // elements; bytes
  int box[3] = {};
};

#pragma GCC visibility push(hidden)
namespace emulation {

enum class Delivery { kLate, kEarly, kRandom };
inline Delivery delivery = Delivery::kLate;
inline bool at_once() {
  return delivery == Delivery::kEarly || (delivery == Delivery::kRandom && (generator() & 1) != 0);
}

// Shared addresses as instructions take them: the block's memory begins here, aligned to 16 only.
constexpr uint32_t kSharedWindow = 0x410;
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - block->shared_memory->data()) + kSharedWindow;
}
inline char* shared_place(uint32_t address, size_t bytes) {
  char* p = block->shared_memory->data() + (int64_t(address) - kSharedWindow);
  check_shared(p, bytes, 1);
  return p;
}
// Swizzle of 128 bytes: which of 8 lines of 1024 bytes says how its 16-byte units are permuted.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The 64 bits of an mbarrier. A phase ends when no arrival and no byte is pending.
struct Mbarrier {
  uint16_t pending, count : 15, phase : 1;
  int32_t bytes;
};
static_assert(sizeof(Mbarrier) == 8);

inline void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  ++progress;
}

// A box on its way to shared memory.
struct BoxCopy {
  CUtensorMap map;
  char* to;
  Mbarrier* barrier;
  int at[3];
};

struct WgmmaOp {
  uint64_t a, b;
  bool f16;
  bool columns_a, columns_b;
};

// Products of a warp, a group a commit; the last group is open.
struct WarpProducts {
  std::deque<std::vector<WgmmaOp>> groups{{}};
  float* sums[32] = {};  // where the lanes keep theirs
  float values[32][64];  // what they will be
  bool flying = false, fenced = false;
};

// D (16 rows of a warp x 128) += A B, of one k-slice of 16.
inline float operand(uint64_t descriptor, int line, int k, bool columns, bool f16) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t offset =
      columns ? uint32_t(line / 64) * leading + uint32_t(k / 8) * stride + uint32_t(k % 8) * 128 +
                    uint32_t(line % 64) * 2
              : uint32_t(line / 8) * stride + uint32_t(line % 8) * 128 + uint32_t(k) * 2;
  uint16_t word;
  memcpy(&word, shared_place(swizzled(start + offset), 2), 2);
  return f16 ? from_f16(word) : from_bf16(word);
}

inline void execute_one(WarpProducts& own, const WgmmaOp& op) {
  constexpr int kK = 16, kColumns = 128;
  const int row0 = int(current->index % 128 / 32) * 16;
  static float a[16][kK], b[kColumns][kK];
  for (int k = 0; k < kK; k++) {
    for (int i = 0; i < 16; i++) a[i][k] = operand(op.a, row0 + i, k, op.columns_a, op.f16);
    for (int j = 0; j < kColumns; j++) b[j][k] = operand(op.b, j, k, op.columns_b, op.f16);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 64; i++) {
      const float* x = a[lane / 4 + i / 2 % 2 * 8];
      const float* y = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
      double sum = double(own.values[lane][i]);
      for (int k = 0; k < kK; k++) sum += double(x[k]) * double(y[k]);
      own.values[lane][i] = rounded_sum(sum);
    }
}

// All complete groups but so many.
inline void execute(WarpProducts& own, size_t left) {
  for (; own.groups.size() > left + 1; own.groups.pop_front())
    for (const WgmmaOp& op : own.groups.front()) execute_one(own, op);
}

// Of a block.
struct Sm90 : Extra {
  std::deque<BoxCopy> copies;
  std::map<unsigned, WarpProducts> products;
  std::set<const void*> made, ready;  // mbarriers: initialised, and behind a fence
  int free_registers = 0;             // of all threads

  void deliver(size_t number) {
    const BoxCopy copy = copies[number];
    copies.erase(copies.begin() + int64_t(number));
    const CUtensorMap& map = copy.map;
    for (int line = 0; line < map.box[1]; line++)
      for (int i = 0; i < map.box[0]; i++) {
        const int64_t at[3] = {copy.at[0] + int64_t(i), copy.at[1] + int64_t(line), copy.at[2]};
        bool inside = true;
        int64_t offset = 0;
        for (int d = 0; d < 3; d++) {
          inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
          offset += at[d] * map.strides[d];
        }
        uint16_t value = 0;
        if (inside) memcpy(&value, map.base + offset, 2);
        const uint32_t to = shared_address(copy.to) + uint32_t(line * map.box[0] + i) * 2;
        memcpy(shared_place(swizzled(to), 2), &value, 2);
      }
    copy.barrier->bytes -= map.box[0] * map.box[1] * 2;
    ++progress;
    settle(*copy.barrier);
  }
  bool move_on() override {
    if (copies.empty()) return false;
    deliver(delivery == Delivery::kRandom ? generator() % copies.size() : 0);
    return true;
  }
  void check_end() override {
    if (!copies.empty()) die("a copy by TMA was never waited for");
    for (const auto& [warp, own] : products)
      if (own.flying) die("wgmma was never waited for");
  }
};
inline Sm90& sm90() {
  if (block->extra == nullptr) block->extra = std::make_unique<Sm90>();
  return static_cast<Sm90&>(*block->extra);
}

inline Mbarrier& mbarrier(uint64_t* barrier) {
  check_shared(barrier, 8, 8);
  if (sm90().made.count(barrier) == 0) die("an mbarrier was not initialised");
  return *reinterpret_cast<Mbarrier*>(barrier);
}

inline WarpProducts& own_products() { return sm90().products[current->index / 32]; }

// All lanes of a warp say the same; sums are taken away when the first product is issued.
inline void issue(float* sums, const WgmmaOp& op) {
  for (const uint64_t descriptor : {op.a, op.b})
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
      die("a descriptor without the swizzle of 128 bytes");
  WarpProducts& own = own_products();
  const unsigned l = lane();
  Words& words = exchange();
  memcpy(words[l], &op.a, 8);
  memcpy(words[l] + 2, &op.b, 8);
  if (own.flying && own.sums[l] != sums) die("wgmma with other sums than those in flight");
  own.sums[l] = sums;
  wait_for_warp([&] {
    for (const auto& other : words)
      if (memcmp(other, words[0], 16) != 0) die("lanes differ in a descriptor");
    if (!own.flying) {
      if (!own.fenced) die("wgmma on sums without a fence");
      for (int i = 0; i < 32; i++) {
        memcpy(own.values[i], own.sums[i], sizeof(own.values[i]));
        memset(own.sums[i], 0xFF, sizeof(own.values[i]));
      }
      own.flying = true;
    }
    own.groups.back().push_back(op);
  });
}

// Registers of a thread that compiles for so many threads a block, and one block a multiprocessor.
inline int registers_at_launch() { return std::min(65536 / threads / 8 * 8, 255); }

}  // namespace emulation
#pragma GCC visibility pop

// The functions that csrc/cuda/symmetric_matmul/ptx_sm90.h holds for nvcc.
namespace spectral_kernels::cuda {

inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulation::check_shared(barrier, 8, 8);
  emulation::sm90().made.insert(barrier);
  auto& made = *reinterpret_cast<emulation::Mbarrier*>(barrier);
  made.pending = made.count = uint16_t(arrivals);
  made.phase = 0;
  made.bytes = 0;
}
inline void mbarrier_init_fence() { emulation::sm90().ready = emulation::sm90().made; }
inline void mbarrier_arrive(uint64_t* barrier) {
  emulation::Mbarrier& own = emulation::mbarrier(barrier);
  if (own.pending == 0) emulation::die("more arrivals at an mbarrier than it counts");
  own.pending--;
  ++emulation::progress;
  emulation::settle(own);
}
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  emulation::mbarrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const emulation::Mbarrier& own = emulation::mbarrier(barrier);
  while (own.phase == parity)
    if (!emulation::at_once() || !emulation::sm90().move_on()) emulation::yield();
}

inline void tma_load(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  const auto& source = *static_cast<const CUtensorMap*>(map);
  const size_t bytes = size_t(source.box[0] * source.box[1]) * 2;
  emulation::check_shared(to, bytes, 1);
  if (emulation::shared_address(to) % 128 != 0) emulation::die("TMA to a misaligned place");
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) emulation::die("a tensor map is misaligned");
  emulation::Mbarrier& own = emulation::mbarrier(barrier);
  emulation::Sm90& block = emulation::sm90();
  if (block.ready.count(barrier) == 0) emulation::die("TMA may not see the mbarrier yet");
  memset(to, 0xFF, bytes);
  block.copies.push_back({source, static_cast<char*>(to), &own, {x, y, z}});
  if (emulation::at_once()) block.deliver(block.copies.size() - 1);
}

template <int kCount>
void take_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  const int more = kCount - emulation::registers_at_launch();
  if (more < 0) emulation::die("setmaxnreg.inc to fewer registers");
  while (emulation::sm90().free_registers < more) emulation::yield();
  emulation::sm90().free_registers -= more;
}
template <int kCount>
void leave_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  const int fewer = emulation::registers_at_launch() - kCount;
  if (fewer < 0) emulation::die("setmaxnreg.dec to more registers");
  emulation::sm90().free_registers += fewer;
  ++emulation::progress;
}

inline void wgmma_fence() {
  emulation::wait_for_warp([] { emulation::own_products().fenced = true; });
}
template <bool kF16, int kColumnsA, int kColumnsB>
void wgmma(float* sums, uint64_t a, uint64_t b) {
  emulation::issue(sums, {a, b, kF16, kColumnsA != 0, kColumnsB != 0});
}
inline void wgmma_commit() {
  emulation::wait_for_warp([] {
    emulation::WarpProducts& own = emulation::own_products();
    own.groups.push_back({});
    if (emulation::at_once()) emulation::execute(own, 0);
  });
}
template <int kLeft>
void wgmma_wait() {
  emulation::wait_for_warp([] {
    emulation::WarpProducts& own = emulation::own_products();
    emulation::execute(own, kLeft);
    if (!own.flying || own.groups.size() > 1 || !own.groups[0].empty()) return;
    for (int i = 0; i < 32; i++) memcpy(own.sums[i], own.values[i], sizeof(own.values[i]));
    own.flying = own.fenced = false;
  });
}

}  // namespace spectral_kernels::cuda

// What the host calls: the driver's encoder of tensor maps, and how it is found.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// Refuses what the driver refuses of 16-bit tensors of three dimensions.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* base, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  bool good = rank == 3 && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
  for (int d = 0; d < 3; d++) {
    good = good && sizes[d] > 0 && sizes[d] <= uint64_t(1) << 32 && box[d] > 0 && box[d] <= 256 &&
           steps[d] == 1;
    if (d > 0) good = good && strides[d - 1] % 16 == 0 && strides[d - 1] < uint64_t(1) << 40;
  }
  if (!good || box[2] != 1) return CUDA_ERROR_INVALID_VALUE;
  map->base = static_cast<const char*>(base);
  for (int d = 0; d < 3; d++) {
    map->sizes[d] = int64_t(sizes[d]);
    map->strides[d] = d == 0 ? 2 : int64_t(strides[d - 1]);
    map->box[d] = int(box[d]);
  }
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
