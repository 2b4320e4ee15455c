// SPDX-License-Identifier: Apache-2.0
// Memory for large results. Fresh pages cost more than a gradient does: the kernel clears each of them at its first touch.
// So a freed block stays mapped, marked so that the system may take its pages whenever it needs them (MADV_FREE), and the
// next blocks write to pages that are there already: a training loop faults in its gradient once.
#pragma once

#include <stddef.h>

namespace fastloss {

// One block on huge pages, uninitialised, aligned to them. Throws std::bad_alloc.
class RecycledBlock {
 public:
  explicit RecycledBlock(size_t bytes);
  ~RecycledBlock();
  RecycledBlock(const RecycledBlock&) = delete;
  RecycledBlock& operator=(const RecycledBlock&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_;
  size_t bytes_, capacity_;
};

// Unmaps all that is kept, and returns how many bytes that was. Blocks in use stay.
size_t release_recycled();

}  // namespace fastloss
