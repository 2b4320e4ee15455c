// SPDX-License-Identifier: Apache-2.0
// What only a GPU can do, each of it in a line or two: tests/cuda_emulation/emulated_gpu.hpp offers the same names on the CPU,
// so that the kernels run there as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "../simd/scalar.hpp"
#include "problem.hpp"

#define FASTLOSS_SHARED(type, name) __shared__ SharedType<type> name
// As many as the launch asks for.
#define FASTLOSS_SHARED_VECTORS(name) extern __shared__ Vector name[]
// Of so many threads a block at most, and registers for so many blocks a multiprocessor.
#define FASTLOSS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTLOSS_ARGUMENT const __grid_constant__

namespace fastloss {
namespace {

// Templates that CPU and GPU share call these two, so nvcc wants them for the host as well: nothing there calls them.
// 2^x within 2 units in the last place; 0 below the smallest normal number.
FASTLOSS_HD inline float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
#endif
  return x;
}

FASTLOSS_HD inline float max_or_nan(float a, [[maybe_unused]] float b) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
#endif
  return a;
}

// The other one where one is NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

__device__ inline float number(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float number(BF16 x) { return widen(x); }
__device__ inline float number(float x) { return x; }
__device__ inline double number(double x) { return x; }

// Of two numbers each in a word; the other one where one is NaN.
__device__ inline uint32_t larger_halves(uint32_t a, uint32_t b, BF16) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ inline uint32_t larger_halves(uint32_t a, uint32_t b, F16) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// Rounded to nearest even.
__device__ inline void put(float x, F16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void put(float x, BF16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void put(float x, float& out) { out = x; }
__device__ inline void put(double x, double& out) { out = x; }

template <class T>
using SharedType = T;  // an array's, too: it stands before the name

// The same address, in registers from here on: else the compiler works it out anew at each use of it, to save registers.
template <class T>
__device__ inline T* kept(T* address) {
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}

// All lanes of a warp call these together.
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
__device__ inline bool any_lane(bool value) { return __any_sync(kAllLanes, value); }
// A bit for each lane.
__device__ inline uint32_t lanes_where(bool value) { return __ballot_sync(kAllLanes, value); }
__device__ inline uint32_t largest_of_lanes(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
__device__ inline int count_bits(uint32_t bits) { return __popc(bits); }
__device__ inline int first_bit(uint32_t bits) { return __ffs(bits) - 1; }
template <class T>
__device__ inline T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ inline T from_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

// A vector on its way to shared memory, past the registers. What a thread fetches between two calls of end_of_fetch() is a
// group; all but the last kGroups of them have come when it stops waiting.
__device__ inline void fetch_vector(Vector* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(kVectorBytes)
               : "memory");
}
__device__ inline void end_of_fetch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait_for_fetched() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// All threads of the blocks of a cluster call these. Arriving early and waiting late tells that all blocks have begun, before
// which their shared memory is not theirs.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Numbers that blocks of a cluster send each other: a barrier in shared memory counts their bytes, turn after turn. A block
// says in each turn how many it expects; it may be sent some before, but none of the next turn before all of this one are
// there. It begins to count before it arrives at the cluster.
struct Arrivals {
  uint64_t barrier;
};
__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ inline void begin_arrivals([[maybe_unused]] Arrivals& arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(&arrivals.barrier))
      : "memory");
#endif
}
__device__ inline void expect_arrivals([[maybe_unused]] Arrivals& arrivals, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrivals.barrier)), "r"(bytes)
               : "memory");
#endif
}
// To where another block has `shared`; `arrivals` is the one of that block as well.
__device__ inline void send([[maybe_unused]] double& shared, [[maybe_unused]] int block, [[maybe_unused]] double value,
                            [[maybe_unused]] Arrivals& arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 there, barrier;\n\t"
      "mapa.shared::cluster.u32 there, %0, %2;\n\t"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [there], %3, [barrier];\n\t}" ::"r"(shared_address(&shared)),
      "r"(shared_address(&arrivals.barrier)), "r"(block), "d"(value)
      : "memory");
#endif
}
// Acquires for this block, in whose own shared memory the numbers lie. By the letter of PTX the scope is that of the sender,
// the cluster; but that empties the L1 cache, too, which took a tenth of all time.
__device__ inline void wait_for_arrivals([[maybe_unused]] Arrivals& arrivals, [[maybe_unused]] int turn) {
#if __CUDA_ARCH__ >= 900
  uint32_t there = 0;
  while (!there) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(there)
        : "r"(shared_address(&arrivals.barrier)), "r"(turn % 2)
        : "memory");
  }
#endif
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ", " +
                           cudaGetErrorString(status));
}

struct LaunchShape {
  int64_t blocks;
  int parts;              // gridDim.y
  int threads;            // a block
  bool clusters = false;  // the parts of each block are one
  int shared_bytes = 0;   // of the vectors of FASTLOSS_SHARED_VECTORS
};
constexpr int kSharedBytesForAll = 16 << 10;  // beside 32 KiB that a kernel has itself, at most: more must be asked for

// Lets the kernel have so much. It is never taken back: another thread may be about to launch it with more.
template <class... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), int bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.maxDynamicSharedSizeBytes >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  if (shape.blocks == 0 || shape.parts == 0) return;
  const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.parts));
  if (shape.shared_bytes > kSharedBytesForAll) allow_shared_bytes(kernel, shape.shared_bytes);
  if (shape.clusters) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, grid.y, 1};
    cudaLaunchConfig_t config = {
        grid, static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.shared_bytes), stream, &cluster, 1};
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
    return;
  }
  kernel<<<grid, shape.threads, shape.shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "kernel launch");
}

// Whether the code of a kernel that this GPU runs has clusters: it may have been compiled for older ones.
template <class... Parameters>
bool compiled_for_clusters(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

}  // namespace
}  // namespace fastloss
