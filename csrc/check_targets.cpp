// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <string>

#include "engine.hpp"

namespace fastloss {
namespace {

// Target i as an index of the array that holds it: "[2, 0]", or nothing where that has no axes.
std::string place_in(const std::vector<int64_t>& axes, int axis, int k, int64_t i) {
  std::string place;
  const auto prepend = [&](int64_t extent) {
    place = std::to_string(i % extent) + (place.empty() ? "" : ", ") + place;
    i /= extent;
  };
  if (k > 1) prepend(k);
  for (int d = static_cast<int>(axes.size()); d-- > 0;) {
    if (d != axis) prepend(axes[d]);
  }
  return place.empty() ? place : "[" + place + "]";
}

}  // namespace

void check_targets(const Targets& targets, const std::vector<int64_t>& axes, int axis, int64_t classes,
                   const int64_t* ignore_index) {
  int64_t count = targets.k;
  for (size_t d = 0; d < axes.size(); ++d) count *= static_cast<int>(d) == axis ? 1 : axes[d];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = targets[i];
    if (id >= 0 && id < classes) continue;
    if (ignore_index && id == *ignore_index) continue;
    throw std::out_of_range("target" + place_in(axes, axis, targets.k, i) + " = " + std::to_string(id) +
                            " is out of range for " + std::to_string(classes) + " classes");
  }
}

}  // namespace fastloss
