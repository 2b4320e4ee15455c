// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs: the best that this CPU has, FASTLOSS_ISA, or what set_isa asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastloss {

// Kernels in use. Throws std::invalid_argument when FASTLOSS_ISA names an unknown or unavailable instruction set.
const Kernels& kernels();

// Compiled in and supported by this CPU, the fastest last.
std::vector<std::string> available_isas();

void set_isa(const std::string& name);

}  // namespace fastloss
