// SPDX-License-Identifier: Apache-2.0
// The bandwidth that every speed is compared with.
#pragma once

#include <stddef.h>

namespace fastloss {

// Reads every byte / adds one to every 64-bit word, with all threads and nothing else to do: the floor of a pass over the
// logits.
void stream_read(const void* data, size_t bytes);
void stream_update(void* data, size_t bytes);

}  // namespace fastloss
