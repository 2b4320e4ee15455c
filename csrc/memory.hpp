// SPDX-License-Identifier: Apache-2.0
// What fastloss needs of memory as such: huge pages for fresh gradients, and the bandwidth that every speed is compared with.
#pragma once

#include <stddef.h>

namespace fastloss {

// Asks for huge pages before the first touch: faulting in small pages costs more than computing a gradient.
void advise_huge_pages(void* data, size_t bytes);

// Reads every byte / adds one to every 64-bit word, with all threads and nothing else to do: the floor of a pass over the
// logits.
void stream_read(const void* data, size_t bytes);
void stream_update(void* data, size_t bytes);

}  // namespace fastloss
