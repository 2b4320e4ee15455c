// SPDX-License-Identifier: Apache-2.0
#include "recycled.hpp"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace fastloss {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSlack = 2;  // a kept block serves requests down to its size over this

struct Span {
  char* data;
  size_t capacity;
};

// Blocks in use and blocks kept never hold more together than the blocks in use once did and an eighth: so recycling makes no
// peak much higher, and a small block does not push out the large one that is wanted next.
class Recycler {
 public:
  Span take(size_t bytes) {
    const size_t wanted = (std::max<size_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->capacity >= wanted && it->capacity / kSlack <= wanted;
      if (fits && (best == kept_.end() || it->capacity < best->capacity)) best = it;
    }
    Span span;
    if (best != kept_.end()) {
      span = *best;
      kept_.erase(best);
      kept_bytes_ -= span.capacity;
    } else {
      evict_until(limit() > in_use_ + wanted ? limit() - in_use_ - wanted : 0);
      span = {map(wanted), wanted};
    }
    in_use_ += span.capacity;
    peak_ = std::max(peak_, in_use_);
    return span;
  }

  void give_back(Span span) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= span.capacity;
#if defined(MADV_FREE)
    if (madvise(span.data, span.capacity, MADV_FREE) == 0) {
      kept_.push_back(span);
      kept_bytes_ += span.capacity;
      evict_until(limit() - in_use_);
      return;
    }
#endif
    munmap(span.data, span.capacity);
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t released = kept_bytes_;
    evict_until(0);
    peak_ = in_use_;
    return released;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  size_t limit() const { return peak_ + peak_ / 8; }

  static char* map(size_t bytes) {
    void* room = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(room);
    char* data = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (data > begin) munmap(begin, data - begin);
    munmap(data + bytes, begin + kHugePage - data);
#if defined(MADV_HUGEPAGE)
    (void)madvise(data, bytes, MADV_HUGEPAGE);  // advice only: where the system has no huge pages, small ones serve
#endif
    return data;
  }

  // The block that was freed first goes first.
  void evict_until(size_t bytes) {
    auto it = kept_.begin();
    for (; kept_bytes_ > bytes; ++it) {
      munmap(it->data, it->capacity);
      kept_bytes_ -= it->capacity;
    }
    kept_.erase(kept_.begin(), it);
  }

  std::mutex mutex_;
  std::vector<Span> kept_;
  size_t kept_bytes_ = 0, in_use_ = 0, peak_ = 0;
};

// Never destroyed: blocks may be freed while the process ends. Around a fork the lock is held, so that the child finds it free.
Recycler& recycler() {
  static Recycler& instance = *new Recycler;
  static const int registered =
      pthread_atfork([] { recycler().lock(); }, [] { recycler().unlock(); }, [] { recycler().unlock(); });
  (void)registered;
  return instance;
}

}  // namespace

RecycledBlock::RecycledBlock(size_t bytes) : bytes_(bytes) {
  const Span span = recycler().take(bytes);
  data_ = span.data;
  capacity_ = span.capacity;
}

RecycledBlock::~RecycledBlock() { recycler().give_back({data_, capacity_}); }

size_t release_recycled() { return recycler().release(); }

}  // namespace fastloss
