// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/gpu.cuh on the CPU: the kernels compile as C++, and each thread of a block is a fiber. Fibers change over where
// threads wait for each other, at __syncthreads() and where a warp exchanges values; in between, each runs by itself, from the
// first thread to the last or the other way round. So what one thread may not see before a barrier, it sees wrongly in one of
// the two orders. What this cannot show: speed, the memory model of a GPU, and what its hardware rounds differently.
#pragma once

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <stdexcept>
#include <vector>

#include "simd/scalar.hpp"

#define __device__
#define FASTLOSS_SHARED static  // blocks run one after the other
#define FASTLOSS_KERNEL(threads, blocks) void
#define FASTLOSS_ARGUMENT const

namespace fastloss {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Dim3 {
  unsigned x = 1, y = 1;
};
Dim3 threadIdx, blockIdx, blockDim, gridDim;

// The fibers of one block.
class Block {
 public:
  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    grow(threads);
    fibers_.assign(threads, {});
    exchange_.assign(threads, {});
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack = {stacks_[i], 0, kStackBytes};
      fibers_[i].context.uc_link = &scheduler_;
      makecontext(&fibers_[i].context, &Block::enter, 0);
    }
    const bool backwards = getenv("FASTLOSS_EMULATION_BACKWARDS") != nullptr;
    for (int left = threads; left > 0;) {
      bool moved = false;
      for (int i = 0; i < threads; ++i) {
        const int thread = backwards ? threads - 1 - i : i;
        Fiber& fiber = fibers_[thread];
        if (fiber.done || !may_go(thread)) continue;
        moved = true;
        threadIdx.x = thread;
        current_ = thread;
        swapcontext(&scheduler_, &fiber.context);
        if (fiber.done) --left;
      }
      if (!moved) fail("threads wait for a barrier that others never reach");
    }
  }

  void wait_for_block() { wait(&Fiber::block_waits); }

  // The value of another lane of this warp.
  template <class T>
  T exchange(T value, int lane) {
    static_assert(sizeof(T) <= 8);
    const int thread = current_;
    const int turn = fibers_[thread].warp_waits % 2;  // so that nobody overwrites what others have yet to read
    memcpy(exchange_[thread].value[turn], &value, sizeof value);
    wait(&Fiber::warp_waits);
    T other;
    memcpy(&other, exchange_[thread / kWarp * kWarp + lane].value[turn], sizeof other);
    return other;
  }

  int lane() const { return current_ % kWarp; }

 private:
  struct Fiber {
    ucontext_t context;
    bool done = false;
    int64_t block_waits = 0, warp_waits = 0;  // barriers reached so far
    int64_t Fiber::* waits_at = nullptr;
  };
  struct Exchange {
    char value[2][8];
  };

  static void fail(const char* what) {
    fprintf(stderr, "emulated GPU: %s\n", what);
    abort();  // fibers cannot be unwound
  }

  static void enter();

  void wait(int64_t Fiber::* barrier) {
    Fiber& fiber = fibers_[current_];
    ++(fiber.*barrier);
    fiber.waits_at = barrier;
    const int thread = current_;
    swapcontext(&fiber.context, &scheduler_);
    fibers_[thread].waits_at = nullptr;
  }

  // All who share the barrier have reached it as often, or have ended: a barrier does not wait for threads that are gone.
  bool may_go(int thread) const {
    const Fiber& fiber = fibers_[thread];
    if (!fiber.waits_at) return true;
    const bool warp = fiber.waits_at == &Fiber::warp_waits;
    const size_t begin = warp ? thread / kWarp * kWarp : 0, end = warp ? begin + kWarp : fibers_.size();
    for (size_t i = begin; i < end; ++i) {
      if (fibers_[i].*fiber.waits_at >= fiber.*fiber.waits_at) continue;
      if (!fibers_[i].done) return false;
      if (warp) fail("a warp exchanges values with a thread that has ended");
    }
    return true;
  }

  void grow(int threads) {
    while (static_cast<int>(stacks_.size()) < threads) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(stack);
    }
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchange_;
  std::vector<void*> stacks_;
  ucontext_t scheduler_;
  int current_ = 0;
};

Block block;

void Block::enter() {
  (*block.body_)();
  block.fibers_[block.current_].done = true;
}

inline void __syncthreads() { block.wait_for_block(); }
inline bool any_lane(bool value) {
  int any = value;
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) any |= block.exchange(any, block.lane() ^ mask);
  return any;
}
template <class T>
T from_lane_xor(T value, int mask) {
  return block.exchange(value, block.lane() ^ mask);
}
template <class T>
T from_lane(T value, int lane) {
  return block.exchange(value, lane);
}

// As far off as the hardware may be: 2 units in the last place, up or down as it happens; 0 below the smallest normal number.
inline float exp2_approx(float x) {
  const float exact = exp2f(x);
  if (exact < 0x1p-126f) return 0.0f;
  if (x == 0.0f || !(exact < INFINITY)) return exact;
  const uint32_t bits = float_bits(exact);
  return float_of((float_bits(x) * 0x9e3779b9u) >> 31 ? bits + 2 : bits - 2);
}
inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float larger(float a, float b) { return fmaxf(a, b); }
inline double larger(double a, double b) { return fmax(a, b); }

template <class T>
inline auto number(T x) {
  return widen(x);
}
inline void put(float x, F16& out) { out = to_f16(x); }
// Unlike the instructions of CPUs, those of GPUs keep subnormal numbers.
inline void put(float x, BF16& out) {
  const uint32_t bits = float_bits(x);
  out = x != x ? to_bf16(x) : BF16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline void put(float x, float& out) { out = x; }
inline void put(double x, double& out) { out = x; }

struct LaunchShape {
  int64_t blocks;
  int parts;
  int threads;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  blockDim.x = shape.threads;
  gridDim = {static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.parts)};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) block.run(shape.threads, [&] { kernel(arguments...); });
  }
}

}  // namespace
}  // namespace fastloss
