// SPDX-License-Identifier: Apache-2.0
#include "bandwidth.hpp"

#include <stdint.h>

#include <algorithm>
#include <atomic>

#include "parallel.hpp"

namespace fastloss {
namespace {

constexpr size_t kPiece = size_t{1} << 20;

template <class F>
void in_pieces(size_t bytes, F f) {
  parallel_for(static_cast<int64_t>((bytes + kPiece - 1) / kPiece), get_num_threads(), [&](int64_t i) {
    const size_t begin = static_cast<size_t>(i) * kPiece;
    f(begin / sizeof(uint64_t), std::min(bytes, begin + kPiece) / sizeof(uint64_t));
  });
}

}  // namespace

void stream_read(const void* data, size_t bytes) {
  static std::atomic<uint64_t> sink;
  const uint64_t* words = static_cast<const uint64_t*>(data);
  in_pieces(bytes, [&](size_t begin, size_t end) {
    uint64_t sum[8] = {};
    size_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int k = 0; k < 8; ++k) sum[k] ^= words[i + k];
    }
    for (; i < end; ++i) sum[0] ^= words[i];
    for (int k = 1; k < 8; ++k) sum[0] ^= sum[k];
    sink.fetch_xor(sum[0], std::memory_order_relaxed);
  });
}

void stream_update(void* data, size_t bytes) {
  uint64_t* words = static_cast<uint64_t*>(data);
  in_pieces(bytes, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) words[i] += 1;
  });
}

}  // namespace fastloss
