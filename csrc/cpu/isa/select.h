// Which of the compiled instruction sets runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace spectral_kernels::cpu {

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();
// The others, each with the sentence that says why.
std::vector<std::pair<std::string, std::string>> refused_isas();
// The best set up to `name`; the empty name goes back to the environment's choice.
void set_isa_cap(const std::string& name);

}  // namespace spectral_kernels::cpu
