// SPDX-License-Identifier: Apache-2.0
// From which sizes on work is done in another way, whatever the work is.
#pragma once

#include <stdint.h>

namespace fastloss {

constexpr int64_t kStreamBytes = int64_t{1} << 25;    // a result from here on would only push other data out of the caches
constexpr int64_t kSerialProduct = int64_t{1} << 20;  // multiplications that are not worth a second thread

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastloss
