#include "select.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "sets.h"

namespace spectral_kernels::cpu {
namespace {

// Whether fp32 products may be sums of bf16 ones.
bool split_fp32() {
  static const bool split = [] {
    const char* wish = std::getenv("SPECTRAL_KERNELS_SPLIT_FP32");
    const std::string value = wish == nullptr || *wish == '\0' ? "1" : wish;
    if (value != "0" && value != "1")
      throw std::runtime_error("SPECTRAL_KERNELS_SPLIT_FP32 is '" + value + "'; it can be 0 or 1");
    return value == "1";
  }();
  return split;
}

struct Set {
  const char* name;
  const Kernels& (*table)();
  std::string (*refusal)();  // why it cannot run here; empty where it can
};

#if defined(__x86_64__)
std::string unless(bool has, const char* what) {
  return has ? "" : "the processor has no " + std::string(what);
}

// Clang knows no such name for __builtin_cpu_supports before 17.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}

// Linux lends the tile registers only to a process that asks for them. Granted once, the permission
// is that of all its threads and children.
std::string tiles_refusal() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0;
  if (!known || (d & kBf16) == 0 || (d & kTile) == 0) return unless(false, "AMX-BF16");
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return "the system does not permit the tile registers (arch_prctl: " +
         std::string(std::strerror(errno)) + ")";
#else
  return "the tile registers are used on Linux only";
#endif
}
#endif

#if defined(__x86_64__)
const Kernels& amx_table() { return split_fp32() ? amx::table() : amx::fma_table(); }
#endif

// From the least to the most capable; a set runs only where all before it do.
const Set kSets[] = {
    {"baseline", baseline::table, [] { return std::string(); }},
#if defined(__x86_64__)
    {"avx2", avx2::table,
     [] {
       return unless(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(),
                     "AVX2 with FMA and F16C");
     }},
    {"avx512", avx512::table,
     [] {
       return unless(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
                     "AVX-512 F, BW, DQ and VL");
     }},
    {"avx512bf16", avx512bf16::table,
     [] { return unless(__builtin_cpu_supports("avx512bf16"), "AVX512-BF16"); }},
    {"amx", amx_table,
     [] {
       static const std::string refusal = tiles_refusal();
       return refusal;
     }},
#endif
};

std::string known_names() {
  std::string names;
  for (const Set& set : kSets) names += (names.empty() ? "" : ", ") + std::string(set.name);
  return names;
}

const Kernels* best_up_to(const std::string& cap) {
  const Kernels* best = nullptr;
  for (const Set& set : kSets) {
    if (!set.refusal().empty()) break;
    best = &set.table();
    if (cap == set.name) break;
  }
  return best;
}

bool is_known(const std::string& name) {
  for (const Set& set : kSets)
    if (name == set.name) return true;
  return false;
}

// A wrong name in the environment must not pass silently.
const Kernels* initial() {
  split_fp32();
  const char* cap = std::getenv("SPECTRAL_KERNELS_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return best_up_to("");
  if (!is_known(cap))
    throw std::runtime_error("SPECTRAL_KERNELS_CPU_ISA is '" + std::string(cap) +
                             "'; known instruction sets: " + known_names());
  return best_up_to(cap);
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* set = current.load(std::memory_order_acquire);
  if (set == nullptr) {
    set = initial();
    current.store(set, std::memory_order_release);
  }
  return *set;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Set& set : kSets) names.emplace_back(set.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Set& set : kSets) {
    if (!set.refusal().empty()) break;
    names.emplace_back(set.name);
  }
  return names;
}

std::vector<std::pair<std::string, std::string>> refused_isas() {
  std::vector<std::pair<std::string, std::string>> refused;
  for (const Set& set : kSets) {
    const std::string why =
        refused.empty() ? set.refusal() : "it stands on " + refused.front().first;
    if (!why.empty()) refused.emplace_back(set.name, why);
  }
  return refused;
}

void set_isa_cap(const std::string& name) {
  if (name.empty()) {
    current.store(initial(), std::memory_order_release);
    return;
  }
  if (!is_known(name))
    throw std::invalid_argument("unknown instruction set '" + name + "'; known: " + known_names());
  current.store(best_up_to(name), std::memory_order_release);
}

}  // namespace spectral_kernels::cpu
