// SPDX-License-Identifier: Apache-2.0
#include "recycled.hpp"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace fastloss {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

struct Span {
  char* data;
  size_t capacity;
};

// Blocks in use and memory kept never hold more together than the blocks in use once did: so recycling makes no peak higher.
// A smaller block takes a part of what is kept, and parts side by side become one again.
class Recycler {
 public:
  Span take(size_t bytes) {
    const size_t wanted = (std::max<size_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->capacity >= wanted && (best == kept_.end() || it->capacity < best->capacity)) best = it;
    }
    Span span{nullptr, wanted};
    if (best != kept_.end()) {
      span.data = best->data;
      best->data += wanted;
      best->capacity -= wanted;
      kept_bytes_ -= wanted;
      if (best->capacity == 0) kept_.erase(best);
      renew_what_was_taken(span);
    } else {
      evict_until(peak_ > in_use_ + wanted ? peak_ - in_use_ - wanted : 0);
      span.data = map(wanted);
    }
    in_use_ += wanted;
    peak_ = std::max(peak_, in_use_);
    return span;
  }

  void give_back(Span span) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= span.capacity;
#if defined(MADV_FREE)
    if (madvise(span.data, span.capacity, MADV_FREE) == 0) {
      keep(span);
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
  void keep(Span span) {
    kept_bytes_ += span.capacity;
    const auto joins = [&span](const Span& other) {
      const bool before = other.data + other.capacity == span.data, behind = span.data + span.capacity == other.data;
      if (before) span.data = other.data;
      if (before || behind) span.capacity += other.capacity;
      return before || behind;
    };
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), joins), kept_.end());
    kept_.push_back(span);
  }

  // Where the system took pages back, what comes in their place, and what is left around them, are small pages: a new mapping
  // gets huge ones again.
  static void renew_what_was_taken(Span span) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> resident(kHugePage / page);
    const auto was_taken = [&](char* data) {
      if (mincore(data, kHugePage, resident.data()) != 0) return false;
      unsigned char all = 1;
      for (const unsigned char r : resident) all &= r;
      return all == 0;
    };
    char* const end = span.data + span.capacity;
    for (char* data = span.data; data < end; data += kHugePage) {
      if (!was_taken(data)) continue;
      char* const begin = data;
      while (data + kHugePage < end && was_taken(data + kHugePage)) data += kHugePage;
      const size_t bytes = data + kHugePage - begin;
      if (mmap(begin, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
        throw std::bad_alloc();
      }
      want_huge_pages(begin, bytes);
    }
  }

  static void want_huge_pages(char* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    (void)madvise(data, bytes, MADV_HUGEPAGE);  // advice only: where the system has no huge pages, small ones serve
#endif
  }

  static char* map(size_t bytes) {
    void* room = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(room);
    char* data = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (data > begin) munmap(begin, data - begin);
    munmap(data + bytes, begin + kHugePage - data);
    want_huge_pages(data, bytes);
    return data;
  }

  // What was freed first goes first.
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
