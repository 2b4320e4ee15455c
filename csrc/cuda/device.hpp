// SPDX-License-Identifier: Apache-2.0
// The vector types of the GPU, one lane wide each: a thread is a lane. And what all threads of a warp work out together.
#pragma once

#if defined(__CUDACC__)
#include "gpu.cuh"
#else
#include "emulated_gpu.hpp"
#endif

#include "../row.hpp"

namespace fastloss {
namespace {

// As ScalarF32, but for exp, which the hardware has: the polynomial would cost more than memory leaves time for.
struct CudaF32 : ScalarF32 {};
struct CudaF64 : ScalarF64 {};

template <>
FASTLOSS_HD inline float clamp_exponent<CudaF32>(float x) {
  return max_or_nan(ExpConstants<float>::kLowest, x);
}

// exp(0) is exactly 1. The product rounds x by |x| 2^-24, relative to the result.
template <>
FASTLOSS_HD inline float exp_clamped<CudaF32>(float x) {
  return exp2_approx(x * 0x1.715476p+0f);
}

// exp(x) for x <= 0, -inf and NaN included.
template <class V>
__device__ inline typename V::T exp_of(typename V::T x) {
  return exp_clamped<V>(sizeof(x) == 4 ? x : clamp_exponent<V>(x));  // exp2_approx needs no clamp
}

template <class T>
struct AccumulatedIn {
  using V = CudaF32;
};
template <>
struct AccumulatedIn<double> {
  using V = CudaF64;
};

// Every lane gets the result, by a fixed tree.
template <class T, class Merge>
__device__ inline T over_warp(T value, Merge merge) {
#pragma unroll
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) value = merge(value, from_lane_xor(value, mask));
  return value;
}

__device__ inline double sum_over_warp(double value) {
  return over_warp(value, [](double a, double b) { return a + b; });
}

// Of no NaN.
__device__ inline double max_over_warp(double value) {
  return over_warp(value, [](double a, double b) { return a > b ? a : b; });
}
__device__ inline float max_over_warp(float value) {  // whose bits, those of negative ones turned round, have the same order
  constexpr uint32_t kSign = 0x80000000u;
  const uint32_t bits = float_bits(value), top = largest_of_lanes(bits & kSign ? ~bits : bits | kSign);
  return float_of(top & kSign ? top ^ kSign : ~top);
}

__device__ inline int64_t min_over_warp(int64_t value) {
  return over_warp(value, [](int64_t a, int64_t b) { return a < b ? a : b; });
}

}  // namespace
}  // namespace fastloss
