// SPDX-License-Identifier: Apache-2.0
// The sampled backward of linear cross-entropy: few of the gradient's entries are kept, at random, without bias.
//
// With c the gradient by one logit and t the threshold, c is kept if |c| > u t, u uniform in (0, 1], with the value
// sign(c) max(|c|, t): as it is where |c| >= t, else as t with probability |c| / t. The expectation is c, at most
// sum_j |c_j| / t entries of a row are kept on average, and the variance of an entry is at most t |c|. The rule is the optimal
// unbiased sparsifier of Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed Optimization" (2018).
// Random numbers are a hash of (seed, row, column), so that no order of work changes them.
#pragma once

#include "kernels.hpp"

namespace fastloss {
namespace {

FASTLOSS_HD inline uint64_t mix64(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

FASTLOSS_HD inline RandomKey random_key(uint64_t seed, int64_t row) {
  const uint64_t bits = mix64(mix64(seed) + 0x9e3779b97f4a7c15 * (static_cast<uint64_t>(row) + 1));
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// t of a row: relative to s = |a|, the factor of its probabilities. `target` is what its one-hot target takes from the
// gradient, so that the label spreads mass - target over other entries: nothing, for a class id without smoothing. The absolute
// values of all entries but the target's sum up to |a| + spread at most. A z-loss of negative log-sum-exp may leave less of a
// than that: then s = (|a| + spread) / 2, so that on average no more than 2 / threshold entries are kept, whatever the loss.
FASTLOSS_HD inline double row_threshold(double threshold, const GradientRow& c, double target, double inv_temperature) {
  const double a = __builtin_fabs(c.a), spread = __builtin_fabs(c.mass - target);
  return threshold * (a < spread ? (a + spread) / 2 : a) * inv_temperature;
}

// Bit i: whether an entry of this magnitude in `column` + i is kept, with u = (random bits + 1/2) / 2^31.
template <class V>
FASTLOSS_HD inline uint32_t kept_mask(typename V::Reg magnitude, uint32_t column, typename V::Reg t, RandomKey key) {
  const auto step = V::mul(t, V::set(0x1p-31)), half = V::mul(t, V::set(0x1p-32));
  return V::mask_greater(magnitude, V::fma(V::random(column, key), step, half));
}

template <class T>
FASTLOSS_HD inline T kept_value(T value, T t) {
  const T magnitude = value < 0 ? -value : value;
  return magnitude < t ? (value < 0 ? -t : t) : value;
}

// Keeps entries of at(0) ... at(n - 1), where `at` makes a register from a place on: the columns `first` and up of a row, one
// block of them at most. Returns how many. `target`, a column of this row or -1, is kept with a value of its own. What is kept
// stands in ascending order of columns in `out`, which has room for n. First all that decides, without a branch: a CPU foresees
// none of the few entries that are kept, and would drop what it had begun on the columns after each.
template <class V, class At>
inline int keep_at_random(At at, int64_t first, int n, int64_t target, typename V::T of_target, double threshold, RandomKey key,
                          Kept<typename V::T>* out) {
  using T = typename V::T;
  static_assert(kBlock / kLanes <= 64, "a bit for each group of columns");
  const auto t = V::set(static_cast<T>(threshold));
  uint64_t mask[kBlock / kLanes], some = 0;
  for (int group = 0; group * kLanes < n; ++group) {
    uint64_t bits = 0;
#pragma GCC unroll 64
    for (int k = 0; k < kLanes; k += V::kWidth) {
      const int i = group * kLanes + k;
      bits |= static_cast<uint64_t>(kept_mask<V>(V::abs(at(i)), static_cast<uint32_t>(first + i), t, key)) << k;
    }
    mask[group] = bits;
    some |= static_cast<uint64_t>(bits != 0) << group;
  }
  if (n % kLanes != 0) mask[n / kLanes] &= (uint64_t{1} << n % kLanes) - 1;
  if (target >= first && target < first + n) {
    mask[(target - first) / kLanes] |= uint64_t{1} << (target - first) % kLanes;
    some |= uint64_t{1} << (target - first) / kLanes;
  }
  int count = 0;
  for (; some != 0; some &= some - 1) {
    const int group = __builtin_ctzll(some);
    for (uint64_t bits = mask[group]; bits != 0; bits &= bits - 1) {
      const int i = group * kLanes + __builtin_ctzll(bits);
      const int64_t column = first + i;
      T value[V::kWidth];
      V::store(value, at(i / V::kWidth * V::kWidth));
      out[count++] = {static_cast<int32_t>(column),
                      column == target ? of_target : kept_value(value[i % V::kWidth], static_cast<T>(threshold))};
    }
  }
  return count;
}

}  // namespace
}  // namespace fastloss
