// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps from call to call: uninitialised, as large as the largest demand, on whole cache lines.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>

namespace fastloss {

template <class T>
class Room {
 public:
  T* of(size_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = count * sizeof(T);
    if (bytes_ < bytes) {
      memory_.reset(new char[bytes + kLine]);
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine) % kLine);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t bytes_ = 0;
};

}  // namespace fastloss
