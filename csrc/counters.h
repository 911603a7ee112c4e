// Calls of every operator by backend: the proof of which path ran.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace spectral_kernels {

void count_call(const char* op, const char* backend);
// "op/backend" -> calls since the last reset.
std::map<std::string, int64_t> call_counts();
void reset_call_counts();

}  // namespace spectral_kernels
