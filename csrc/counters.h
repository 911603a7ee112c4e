// Calls of every operator by backend: the proof of which path ran. And what went wrong underneath.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace spectral_kernels {

void count_call(const char* op, const char* backend);
// "op/backend" -> calls since the last reset.
std::map<std::string, int64_t> call_counts();
void reset_call_counts();

// A decomposition, LAPACK's or our own, that was not what it should be: "eigh" where LAPACK
// computed it again, and "eigh/again" where that was wrong too.
void count_fault(const std::string& name);
// Since the process started.
std::map<std::string, int64_t> fault_counts();
int64_t faults();

}  // namespace spectral_kernels
