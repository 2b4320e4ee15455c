// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/gpu.cuh on the CPU: the kernels compile as C++, and each thread of a block, or of the blocks of a cluster, is a
// fiber. Fibers change over where threads wait for each other, at the barriers of block and cluster and where a warp exchanges
// values; in between, each runs by itself, from the first thread to the last or the other way round. So what one thread may not
// see before a barrier, it sees wrongly in one of the two orders; and what it fetches comes as late as it may in the first one,
// at once in the other. What this cannot show: speed, the memory model of a GPU, and
// what its hardware rounds differently.
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

#include "cuda/problem.hpp"
#include "simd/scalar.hpp"

#define __device__
// One for each block of a cluster; clusters run one after the other.
#define FASTLOSS_SHARED(type, name)                         \
  static SharedType<type> of_blocks_##name[kMostOfCluster]; \
  auto& name = of_blocks_##name[cluster.block()];           \
  cluster.note_shared(of_blocks_##name, sizeof(of_blocks_##name[0]))
#define FASTLOSS_SHARED_VECTORS(name) Vector* const name = cluster.shared_vectors()
#define FASTLOSS_KERNEL(threads, blocks) void
#define FASTLOSS_ARGUMENT const

namespace fastloss {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

template <class T>
using SharedType = T;

struct Dim3 {
  unsigned x = 1, y = 1;
};
Dim3 threadIdx, blockIdx, blockDim, gridDim;

// The fibers of one block, or of the blocks of a cluster one after the other: those of blockIdx.y from `first` on.
class Cluster {
 public:
  void run(int first, int blocks, int threads, int shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    threads_ = threads;
    shared_.assign(blocks, std::vector<Vector>(shared_bytes / sizeof(Vector), kPoison));
    const int all = blocks * threads;
    grow(all);
    fibers_.assign(all, {});
    cluster_passed_ = straggler_ = 0;
    exchange_.assign(all, {});
    for (int i = 0; i < all; ++i) {
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack = {stacks_[i], 0, kStackBytes};
      fibers_[i].context.uc_link = &scheduler_;
      makecontext(&fibers_[i].context, &Cluster::enter, 0);
    }
    backwards_ = getenv("FASTLOSS_EMULATION_BACKWARDS") != nullptr;
    int begun = 1;  // blocks: the next one begins when all threads of these wait
    for (int left = all; left > 0;) {
      bool moved = false;
      for (int i = 0; i < begun * threads; ++i) {
        const int thread = backwards_ ? all - 1 - i : i;
        Fiber& fiber = fibers_[thread];
        if (fiber.done || !may_go(thread)) continue;
        moved = true;
        current_ = thread;
        threadIdx.x = thread % threads;
        blockIdx.y = first + block();
        fiber.begun = true;
        swapcontext(&scheduler_, &fiber.context);
        if (fiber.done) --left;
      }
      if (!moved && ++begun > blocks) fail("threads wait for a barrier that others never reach");
    }
  }

  int block() const { return current_ / threads_; }
  Vector* shared_vectors() { return shared_[block()].data(); }

  void fetch(Vector* shared, const void* global) {
    const std::vector<Vector>& room = shared_[block()];
    if (shared < room.data() || shared >= room.data() + room.size()) fail("a vector is fetched to where no room is");
    if (backwards_) {
      memcpy(shared, global, sizeof(Vector));
    } else {
      fibers_[current_].on_their_way.push_back({shared, global});
    }
  }
  void end_of_fetch() { fibers_[current_].on_their_way.push_back({nullptr, nullptr}); }
  void wait_for_fetched(int groups) {
    std::vector<Fetch>& fetches = fibers_[current_].on_their_way;
    int left = 0;
    for (const Fetch& fetch : fetches) left += fetch.shared == nullptr;
    size_t done = 0;
    for (; left > groups; ++done) {
      if (fetches[done].shared) {
        memcpy(fetches[done].shared, fetches[done].global, sizeof(Vector));
      } else {
        --left;
      }
    }
    fetches.erase(fetches.begin(), fetches.begin() + done);
  }

  void wait_for_block() {
    arrive(&Fiber::block_waits);
    wait(&Fiber::block_waits);
  }
  void arrive_at_cluster() { arrive(&Fiber::cluster_waits); }
  void wait_for_cluster() { wait(&Fiber::cluster_waits); }

  // A shared variable of all blocks of a cluster, `size` bytes each.
  void note_shared(void* all, size_t size) {
    for (const Shared& shared : variables_) {
      if (shared.all == all) return;
    }
    variables_.push_back({static_cast<char*>(all), size});
  }

  // What this block has at `mine`, as another has it.
  template <class T>
  T& in_block(T& mine, int other) {
    check_that_block_is_there(other);
    char* const address = reinterpret_cast<char*>(&mine);
    for (const Shared& shared : variables_) {
      if (address >= shared.all && address < shared.all + kMostOfCluster * shared.size) {
        return *reinterpret_cast<T*>(address + (other - block()) * static_cast<int64_t>(shared.size));
      }
    }
    fail("not a shared variable");
  }

  void wait_until(const std::function<bool()>& condition) {
    Fiber& fiber = fibers_[current_];
    while (!condition()) {
      fiber.until = &condition;
      swapcontext(&fiber.context, &scheduler_);
    }
    fiber.until = nullptr;
  }

  void check_that_block_is_there(int block) const {
    for (int i = block * threads_; i < (block + 1) * threads_; ++i) {
      if (!fibers_[i].begun) fail("shared memory of a block that has not begun");
      if (fibers_[i].done) fail("shared memory of a block that may be gone");
    }
  }

  // The value of another lane of this warp.
  template <class T>
  T exchange(T value, int lane) {
    static_assert(sizeof(T) <= 8);
    const int thread = current_;
    const int turn = fibers_[thread].warp_waits % 2;  // so that nobody overwrites what others have yet to read
    memcpy(exchange_[thread].value[turn], &value, sizeof value);
    arrive(&Fiber::warp_waits);
    wait(&Fiber::warp_waits);
    T other;
    memcpy(&other, exchange_[thread / kWarp * kWarp + lane].value[turn], sizeof other);
    return other;
  }

  int lane() const { return current_ % kWarp; }

 private:
  struct Fetch {
    Vector* shared;  // null: the end of a group
    const void* global;
  };
  struct Fiber {
    ucontext_t context;
    bool begun = false, done = false;
    int64_t warp_waits = 0, block_waits = 0, cluster_waits = 0;  // barriers reached so far
    int64_t Fiber::* waits_at = nullptr;
    const std::function<bool()>* until = nullptr;
    std::vector<Fetch> on_their_way;
  };
  struct Shared {
    char* all;
    size_t size;
  };
  static constexpr Vector kPoison = {{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0}};
  struct Exchange {
    char value[2][8];
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulated GPU: %s\n", what);
    abort();  // fibers cannot be unwound
  }

  static void enter();

  void arrive(int64_t Fiber::* barrier) { ++(fibers_[current_].*barrier); }

  void wait(int64_t Fiber::* barrier) {
    Fiber& fiber = fibers_[current_];
    fiber.waits_at = barrier;
    const int thread = current_;
    swapcontext(&fiber.context, &scheduler_);
    fibers_[thread].waits_at = nullptr;
  }

  // All who share the barrier have reached it as often, or have ended: a barrier does not wait for threads that are gone.
  bool may_go(int thread) {
    const Fiber& fiber = fibers_[thread];
    if (fiber.until) return (*fiber.until)();
    if (!fiber.waits_at) return true;
    const bool warp = fiber.waits_at == &Fiber::warp_waits, cluster = fiber.waits_at == &Fiber::cluster_waits;
    const auto arrived = [&](int i) { return fibers_[i].*fiber.waits_at >= fiber.*fiber.waits_at; };
    if (cluster && fiber.cluster_waits == cluster_passed_) return true;
    if (cluster && !arrived(straggler_) && !fibers_[straggler_].done) return false;
    const int group = warp ? kWarp : cluster ? static_cast<int>(fibers_.size()) : threads_;
    const int begin = thread / group * group;
    for (int i = begin; i < begin + group; ++i) {
      if (arrived(i)) continue;
      straggler_ = i;
      if (!fibers_[i].done) return false;
      if (warp) fail("a warp exchanges values with a thread that has ended");
    }
    if (cluster) cluster_passed_ = fiber.cluster_waits;
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
  int threads_ = 1;  // a block
  // What the thousands of threads at a barrier of the cluster need not find out each: the last one that all have reached, and a
  // thread for which some wait.
  int64_t cluster_passed_ = 0;
  int straggler_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<std::vector<Vector>> shared_;  // of each block
  std::vector<Shared> variables_;
  std::vector<Exchange> exchange_;
  std::vector<void*> stacks_;
  ucontext_t scheduler_;
  int current_ = 0;
  bool backwards_ = false;
};

Cluster cluster;

void Cluster::enter() {
  (*cluster.body_)();
  cluster.fibers_[cluster.current_].done = true;
}

inline void __syncthreads() { cluster.wait_for_block(); }
inline bool any_lane(bool value) {
  int any = value;
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) any |= cluster.exchange(any, cluster.lane() ^ mask);
  return any;
}
inline uint32_t lanes_where(bool value) {
  uint32_t bits = value ? 1u << cluster.lane() : 0u;
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) bits |= cluster.exchange(bits, cluster.lane() ^ mask);
  return bits;
}
inline uint32_t largest_of_lanes(uint32_t value) {
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) value = std::max(value, cluster.exchange(value, cluster.lane() ^ mask));
  return value;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int first_bit(uint32_t bits) { return __builtin_ffs(bits) - 1; }
template <class T>
T from_lane_xor(T value, int mask) {
  return cluster.exchange(value, cluster.lane() ^ mask);
}
template <class T>
T from_lane(T value, int lane) {
  return cluster.exchange(value, lane);
}

inline void fetch_vector(Vector* shared, const void* global) { cluster.fetch(shared, global); }
inline void end_of_fetch() { cluster.end_of_fetch(); }
template <class T>
T* kept(T* address) {
  return address;
}
template <int kGroups>
void wait_for_fetched() {
  cluster.wait_for_fetched(kGroups);
}

inline void cluster_arrive() { cluster.arrive_at_cluster(); }
inline void cluster_wait() { cluster.wait_for_cluster(); }

// Bytes that came so far, and that were expected. What is sent comes at once; a turn ends when all that it expects is there.
struct Arrivals {
  int64_t came, expected, turns;
};
inline void begin_arrivals(Arrivals& arrivals) { arrivals = {}; }
inline void expect_arrivals(Arrivals& arrivals, int bytes) {
  arrivals.expected += bytes;
  ++arrivals.turns;
}
inline void send(double& shared, int block, double value, Arrivals& arrivals) {
  cluster.in_block(shared, block) = value;
  cluster.in_block(arrivals, block).came += sizeof value;
}
inline void wait_for_arrivals(Arrivals& arrivals, int turn) {
  cluster.wait_until([&arrivals, turn] { return arrivals.turns > turn && arrivals.came >= arrivals.expected; });
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
template <class T>
uint32_t larger_halves(uint32_t a, uint32_t b, T) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    out |= static_cast<uint32_t>((larger(widen(x), widen(y)) == widen(x) ? x : y).bits) << shift;
  }
  return out;
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
  bool clusters = false;
  int shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  blockDim.x = shape.threads;
  gridDim = {static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.parts)};
  const int together = shape.clusters ? shape.parts : 1;
  for (int part = 0; part < shape.parts; part += together) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      cluster.run(part, together, shape.threads, shape.shared_bytes, [&] { kernel(arguments...); });
    }
  }
}

template <class... Parameters>
bool compiled_for_clusters(void (*)(Parameters...)) {
  return true;
}

}  // namespace
}  // namespace fastloss
