#include "select.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "sets.h"

namespace spectral_kernels::cpu {
namespace {

struct Set {
  const char* name;
  const Kernels& (*table)();
  bool (*supported)();
};

// From the least to the most capable; a set runs only where all before it do.
const Set kSets[] = {
    {"baseline", baseline::table, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", avx2::table,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avx512", avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512bf16", avx512bf16::table, [] { return bool(__builtin_cpu_supports("avx512bf16")); }},
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
    if (!set.supported()) break;
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
    if (!set.supported()) break;
    names.emplace_back(set.name);
  }
  return names;
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
