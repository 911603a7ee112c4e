// What only sm_90a has, for the emulation: clusters of two blocks, mbarriers, TMA and its tensor
// maps, wgmma, registers that warpgroups hand to one another.
//
// Copies and products are asynchronous: they happen as early as they may, as late as they may (a
// copy when nobody can go on without it, a product at its wait) or in between at random, see
// `delivery`. Until then the place of a copy, and the sums of a product, are NaN. Descriptors and
// tensor maps are read bit by bit, swizzled addresses are computed as the hardware does.
//
// Stores by TMA read shared memory as early or as late as they may, too.
//
// What it finds beyond what the rest does: wrong descriptors, maps, coordinates and swizzles;
// results that TMA may not see yet, or that are overwritten before it has; what goes to a block of
// a cluster that has not begun or has ended; stages that are refilled while they are read, or read
// before they are full; wrong parities, arrivals and byte counts; sums that are touched while
// products are in flight; registers that do not suffice.
#pragma once

#include <deque>
#include <map>
#include <set>

#include "threads.h"

#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define __cluster_dims__(...)
#define CLUSTER_BARRIER() emulation::cluster_barrier(__FILE__, __LINE__)
#define LAUNCH_CLUSTERS(kernel, grid, block, bytes, stream, ...) \
  (emulation::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); }, 2), 0)

struct alignas(64) CUtensorMap {
  const char* base = nullptr;
  int64_t sizes[3] = {}, strides[3] = {};  // elements; bytes
  int box[3] = {};
};

#pragma GCC visibility push(hidden)
namespace emulation {

inline void cluster_barrier(const char* file, int line) {
  const Inside inside;
  if (is_left_out(file, line)) return;
  meet(block->cluster[0]->cluster_barrier, threads * int(block->cluster.size()));
}

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

// A box on its way to shared memory, at the same place in one block or in all of a cluster.
struct BoxCopy {
  CUtensorMap map;
  size_t to, barrier;  // bytes from where shared memory begins
  std::vector<Block*> blocks;
  int at[3];
};

// A box on its way from shared memory.
struct BoxStore {
  CUtensorMap map;
  size_t from;
  int at[3];
};

// What a thread has stored, a group a commit; the last group is open.
using Stores = std::deque<std::vector<BoxStore>>;

struct WgmmaOp {
  uint64_t a, b;
  bool f16;
  bool columns_a, columns_b;
};

// Products of a warp, a group a commit; the last group is open.
struct WarpProducts {
  std::deque<std::vector<WgmmaOp>> groups{{}};
  float* sums[32] = {};   // where the lanes keep theirs
  float values[32][128];  // what they will be
  bool flying = false, fenced = false;
};

// D (16 rows of a warp x 256) += A B, of one k-slice of 16.
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
  constexpr int kK = 16, kColumns = 256;
  const int row0 = int(current->index % 128 / 32) * 16;
  static float a[16][kK], b[kColumns][kK];
  for (int k = 0; k < kK; k++) {
    for (int i = 0; i < 16; i++) a[i][k] = operand(op.a, row0 + i, k, op.columns_a, op.f16);
    for (int j = 0; j < kColumns; j++) b[j][k] = operand(op.b, j, k, op.columns_b, op.f16);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 128; i++) {
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
  std::map<unsigned, Stores> stores;  // of a thread
  std::set<unsigned> unseen;          // warps whose results TMA does not see
  std::set<size_t> made, ready;       // mbarriers: initialised, and behind a fence
  int free_registers = 0;             // of all threads

  void deliver(size_t number);
  bool move_on() override {
    if (copies.empty()) return false;
    deliver(delivery == Delivery::kRandom ? generator() % copies.size() : 0);
    return true;
  }
  void check_end() override {
    if (!copies.empty()) die("a copy by TMA was never waited for");
    for (const auto& [thread, groups] : stores)
      if (groups.size() > 1 || !groups[0].empty()) die("a store by TMA was never waited for");
    for (const auto& [warp, own] : products)
      if (own.flying) die("wgmma was never waited for");
  }
};
inline Sm90& sm90(Block* of) {
  if (of->extra == nullptr) of->extra = std::make_unique<Sm90>();
  return static_cast<Sm90&>(*of->extra);
}
inline Sm90& sm90() { return sm90(block); }

inline size_t offset_of(const void* p) {
  return size_t(static_cast<const char*>(p) - block->shared_memory->data());
}

// The mbarrier that has this place in a block.
inline Mbarrier& mbarrier(Block* of, size_t offset) {
  if (of->alive == 0) die("an mbarrier of a block that has ended");
  if (sm90(of).made.count(offset) == 0) die("an mbarrier was not initialised");
  return *reinterpret_cast<Mbarrier*>(of->shared_memory->data() + offset);
}
inline Mbarrier& mbarrier(uint64_t* barrier) {
  check_shared(barrier, 8, 8);
  return mbarrier(block, offset_of(barrier));
}
inline void arrive(Mbarrier& own) {
  tell(&own);
  if (own.pending == 0) die("more arrivals at an mbarrier than it counts");
  own.pending--;
  ++progress;
  settle(own);
}

// Calls go(place in shared memory, place in the tensor, or null outside of it) for every element.
template <class Go>
void for_each_element(const CUtensorMap& map, const int* from, uint32_t address, char* shared,
                      Go go) {
  for (int line = 0; line < map.box[1]; line++)
    for (int i = 0; i < map.box[0]; i++) {
      const int64_t at[3] = {from[0] + int64_t(i), from[1] + int64_t(line), from[2]};
      bool inside = true;
      int64_t offset = 0;
      for (int d = 0; d < 3; d++) {
        inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
        offset += at[d] * map.strides[d];
      }
      const uint32_t place = swizzled(address + uint32_t(line * map.box[0] + i) * 2);
      go(shared + (place - kSharedWindow), inside ? map.base + offset : nullptr);
    }
}

inline void Sm90::deliver(size_t number) {
  const BoxCopy copy = copies[number];
  copies.erase(copies.begin() + int64_t(number));
  const CUtensorMap& map = copy.map;
  for (Block* to : copy.blocks) {
    Mbarrier& own = mbarrier(to, copy.barrier);
    for_each_element(map, copy.at, uint32_t(copy.to) + kSharedWindow, to->shared_memory->data(),
                     [](char* place, const char* from) {
                       uint16_t value = 0;
                       if (from != nullptr) memcpy(&value, from, 2);
                       memcpy(place, &value, 2);
                     });
    own.bytes -= map.box[0] * map.box[1] * 2;
    ++progress;
    settle(own);
  }
}

// All complete groups of stores but so many.
inline void execute(Stores& groups, size_t left) {
  for (; groups.size() > left + 1; groups.pop_front())
    for (const BoxStore& store : groups.front())
      for_each_element(store.map, store.at, uint32_t(store.from) + kSharedWindow,
                       block->shared_memory->data(), [](const char* place, const char* to) {
                         if (to != nullptr) memcpy(const_cast<char*>(to), place, 2);
                       });
}
inline Stores& own_stores() {
  Stores& own = sm90().stores[current->index];
  if (own.empty()) own.push_back({});
  return own;
}

inline void check_box(const CUtensorMap& map, const void* shared) {
  check_shared(shared, size_t(map.box[0] * map.box[1]) * 2, 1);
  if (shared_address(shared) % 128 != 0) die("TMA with a misaligned place");
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) die("a tensor map is misaligned");
}

// What a box has of its tensor is read or written.
inline void touches_box(const CUtensorMap& map, int x, int y, int z, bool write) {
  if (watcher == nullptr || z >= map.sizes[2]) return;
  const int64_t columns = std::min<int64_t>(map.box[0], map.sizes[0] - x);
  for (int64_t line = y; columns > 0 && line < std::min(y + int64_t(map.box[1]), map.sizes[1]);
       line++)
    touches(map.base + x * map.strides[0] + line * map.strides[1] + z * map.strides[2],
            size_t(columns * map.strides[0]), write);
}

inline void load_box(void* to, const void* map, uint64_t* barrier, int x, int y, int z,
                     const std::vector<Block*>& blocks) {
  const auto& source = *static_cast<const CUtensorMap*>(map);
  check_box(source, to);
  const size_t offset = offset_of(to), bytes = size_t(source.box[0] * source.box[1]) * 2;
  for (Block* other : blocks) {
    mbarrier(other, offset_of(barrier));
    if (sm90(other).ready.count(offset_of(barrier)) == 0) die("TMA may not see the mbarrier yet");
    memset(other->shared_memory->data() + offset, 0xFF, bytes);
    touches(other->shared_memory->data() + offset, bytes, true);
    tell(&mbarrier(other, offset_of(barrier)));
  }
  touches_box(source, x, y, z, false);
  Sm90& own = sm90();
  own.copies.push_back({source, offset, offset_of(barrier), blocks, {x, y, z}});
  if (at_once()) own.deliver(own.copies.size() - 1);
}

// Four 8 x 8 matrices from the registers of a warp to the rows that its lanes name.
inline void store(void* row, const uint32_t (&r)[4], bool transposed) {
  check_shared(row, 16, 16);
  touches(row, 16, true);
  Words& words = exchange();
  memcpy(words[lane()], &row, sizeof(row));
  memcpy(words[lane()] + 4, r, sizeof(r));
  wait_for_warp([&] {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
          const int of_row = l / 4, of_column = l % 4 * 2 + e;
          const int line = transposed ? of_column : of_row;
          uint16_t* to;
          memcpy(&to, words[i * 8 + line], sizeof(to));
          to[transposed ? of_row : of_column] = uint16_t(words[l][4 + i] >> 16 * e);
        }
    sm90().unseen.insert(current->index / 32);
  });
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
  const emulation::Inside inside;
  emulation::check_shared(barrier, 8, 8);
  emulation::sm90().made.insert(emulation::offset_of(barrier));
  auto& made = *reinterpret_cast<emulation::Mbarrier*>(barrier);
  made.pending = made.count = uint16_t(arrivals);
  made.phase = 0;
  made.bytes = 0;
}
inline void mbarrier_init_fence() {
  const emulation::Inside inside;
  emulation::sm90().ready = emulation::sm90().made;
}
inline void mbarrier_arrive(uint64_t* barrier) {
  const emulation::Inside inside;
  emulation::arrive(emulation::mbarrier(barrier));
}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  const emulation::Inside inside;
  emulation::check_shared(barrier, 8, 8);
  emulation::arrive(emulation::mbarrier(emulation::block->cluster.at(size_t(rank)),
                                        emulation::offset_of(barrier)));
}
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  const emulation::Inside inside;
  emulation::mbarrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const emulation::Inside inside;
  const emulation::Mbarrier& own = emulation::mbarrier(barrier);
  while (own.phase == parity)
    if (!emulation::at_once() || !emulation::sm90().move_on()) emulation::yield();
  emulation::hear(&own);
}

inline int cluster_rank() {
  const emulation::Inside inside;
  const auto& cluster = emulation::block->cluster;
  return int(std::find(cluster.begin(), cluster.end(), emulation::block) - cluster.begin());
}
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void prefetch_map(const void* map) {
  const emulation::Inside inside;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) emulation::die("a tensor map is misaligned");
}

inline void tma_load(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  const emulation::Inside inside;
  emulation::load_box(to, map, barrier, x, y, z, {emulation::block});
}
inline void tma_load_both(void* to, const void* map, uint64_t* barrier, int x, int y, int z) {
  const emulation::Inside inside;
  emulation::load_box(to, map, barrier, x, y, z, emulation::block->cluster);
}
inline void tma_store(const void* map, const void* from, int x, int y, int z) {
  const emulation::Inside inside;
  const auto& target = *static_cast<const CUtensorMap*>(map);
  emulation::check_box(target, from);
  const unsigned first = emulation::current->index / 128 * 4;
  for (unsigned warp = first; warp < first + 4; warp++)
    if (emulation::sm90().unseen.count(warp) != 0)
      emulation::die("TMA does not see a result without a fence");
  emulation::touches(from, size_t(target.box[0] * target.box[1]) * 2, false);
  emulation::touches_box(target, x, y, z, true);
  emulation::own_stores().back().push_back({target, emulation::offset_of(from), {x, y, z}});
}
inline void tma_store_commit() {
  const emulation::Inside inside;
  emulation::Stores& own = emulation::own_stores();
  own.push_back({});
  if (emulation::at_once()) emulation::execute(own, 0);
}
template <int kLeft>
void tma_store_wait() {
  const emulation::Inside inside;
  emulation::execute(emulation::own_stores(), kLeft);
}
inline void fence_for_tma() {
  const emulation::Inside inside;
  emulation::wait_for_warp([] { emulation::sm90().unseen.erase(emulation::current->index / 32); });
}
inline void store_matrix(void* row, const uint32_t (&r)[4]) {
  const emulation::Inside inside;
  emulation::store(row, r, false);
}
inline void store_matrix_transposed(void* row, const uint32_t (&r)[4]) {
  const emulation::Inside inside;
  emulation::store(row, r, true);
}

template <int kCount>
void take_registers() {
  const emulation::Inside inside;
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  const int more = kCount - emulation::registers_at_launch();
  if (more < 0) emulation::die("setmaxnreg.inc to fewer registers");
  while (emulation::sm90().free_registers < more) emulation::yield();
  emulation::sm90().free_registers -= more;
}
template <int kCount>
void leave_registers() {
  const emulation::Inside inside;
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  const int fewer = emulation::registers_at_launch() - kCount;
  if (fewer < 0) emulation::die("setmaxnreg.dec to more registers");
  emulation::sm90().free_registers += fewer;
  ++emulation::progress;
}

inline void wgmma_fence() {
  const emulation::Inside inside;
  emulation::wait_for_warp([] { emulation::own_products().fenced = true; });
}
template <bool kF16, int kColumnsA, int kColumnsB>
void wgmma(float* sums, uint64_t a, uint64_t b) {
  const emulation::Inside inside;
  emulation::issue(sums, {a, b, kF16, kColumnsA != 0, kColumnsB != 0});
}
template <int kCount>
void fence_sums(float*) {}
inline void wgmma_commit() {
  const emulation::Inside inside;
  emulation::wait_for_warp([] {
    emulation::WarpProducts& own = emulation::own_products();
    own.groups.push_back({});
    if (emulation::at_once()) emulation::execute(own, 0);
  });
}
template <int kLeft>
void wgmma_wait() {
  const emulation::Inside inside;
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
