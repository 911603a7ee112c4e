// What tests and `make gpu` set for a process. A call reads each of them once; results differ by
// `wgmma` alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

namespace spectral_kernels::cuda {

struct Switches {
  // Products of large 16-bit matrices by wgmma on sm_90. They have run on no card yet.
  std::atomic<bool> wgmma{false};
  // All products of a list in one launch, or one launch each; none: as the cost model says.
  std::atomic<std::optional<bool>> queue{};
  // Bytes of workspace that lists of products by factors are cut for.
  std::atomic<int64_t> product_workspace{int64_t(256) << 20};
  // Elements of the parameters that steps in eigenbases work on at a time: 128 MB a workspace.
  std::atomic<int64_t> slice_elements{int64_t(1) << 25};
};

// Those of this process.
inline Switches& switches() {
  static Switches all;
  return all;
}

}  // namespace spectral_kernels::cuda
