// SPDX-License-Identifier: Apache-2.0
// What only a GPU can do, each of it in a line or two: tests/emulated_gpu.hpp offers the same names on the CPU, so that the
// kernels run there as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../simd/scalar.hpp"

#define FASTLOSS_SHARED __shared__
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

// Rounded to nearest even.
__device__ inline void put(float x, F16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void put(float x, BF16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void put(float x, float& out) { out = x; }
__device__ inline void put(double x, double& out) { out = x; }

// All lanes of a warp call these together.
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
__device__ inline bool any_lane(bool value) { return __any_sync(kAllLanes, value); }
template <class T>
__device__ inline T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ inline T from_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ", " +
                           cudaGetErrorString(status));
}

struct LaunchShape {
  int64_t blocks;
  int parts;    // gridDim.y
  int threads;  // a block
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  if (shape.blocks == 0 || shape.parts == 0) return;
  const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.parts));
  kernel<<<grid, shape.threads, 0, stream>>>(arguments...);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace
}  // namespace fastloss
