// Newton–Schulz of lists of matrices whose short side fits on chip: three kernels a segment. The
// Gram matrix R = X Xᵀ is summed over chunks of columns, all steps of the segment run on it in
// shared memory, and X <- Q X.
#pragma once

#include <vector>

#include "../base/list_step.h"
#include "../base/matrix_list.h"
#include "segments.h"

namespace spectral_kernels::cuda {

constexpr int64_t kChunkColumns = 2048;  // of one partial sum of the Gram matrix

// Bytes of shared memory that a short side of `rows` takes.
int64_t onchip_bytes(int rows);

// Workspaces of a list, in elements; also fills in where each entry's begin.
struct OnChipSizes {
  int64_t packed = 0, parts = 0, q = 0, matrices = 0;
};
OnChipSizes place_onchip(std::vector<Entry>& entries, int planes);

struct OnChipBuffers {
  uint16_t* packed = nullptr;
  float* parts = nullptr;
  uint16_t* q = nullptr;
  float* alpha = nullptr;  // one a matrix: Q X is this times the stored product
};

// Whether a matrix of 16-bit numbers can be iterated on where it is: in rows of aligned words of 8,
// and only by a single segment, as the next one needs a place for Q X.
bool readable_in_place(const Entry& e, bool f16, int planes, const std::vector<Segment>& segments);

// All segments of all matrices, and the update. Fills in what is `largest` of direct entries.
int launch_newton_schulz(const std::vector<Entry>& entries, const std::vector<Segment>& segments,
                         bool f16, int planes, uint32_t* largest, const OnChipBuffers& buffers,
                         const Update& update, void* stream);

}  // namespace spectral_kernels::cuda
