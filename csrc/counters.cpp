#include "counters.h"

#include <atomic>
#include <mutex>

namespace spectral_kernels {
namespace {
std::mutex mutex;
std::map<std::string, int64_t> counts, fault_map;
std::atomic<int64_t> fault_total{0};
}  // namespace

void count_call(const char* op, const char* backend) {
  const std::lock_guard<std::mutex> lock(mutex);
  counts[std::string(op) + "/" + backend]++;
}

std::map<std::string, int64_t> call_counts() {
  const std::lock_guard<std::mutex> lock(mutex);
  return counts;
}

void reset_call_counts() {
  const std::lock_guard<std::mutex> lock(mutex);
  counts.clear();
}

void count_fault(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex);
  fault_map[name]++;
  fault_total.fetch_add(1, std::memory_order_relaxed);
}

std::map<std::string, int64_t> fault_counts() {
  const std::lock_guard<std::mutex> lock(mutex);
  return fault_map;
}

int64_t faults() { return fault_total.load(std::memory_order_relaxed); }

}  // namespace spectral_kernels
