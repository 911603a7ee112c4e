#include "counters.h"

#include <mutex>

namespace spectral_kernels {
namespace {
std::mutex mutex;
std::map<std::string, int64_t> counts;
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

}  // namespace spectral_kernels
