// SPDX-License-Identifier: Apache-2.0
// The reference vector type, one lane wide: what every other vector type must do, bit for bit.
#pragma once

#include <stdint.h>

#include "../kernels.hpp"

namespace fastloss {
namespace {

// Storage of the 16-bit types.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

FASTLOSS_HD inline float fma_f32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTLOSS_HD inline double fma_f64(double a, double b, double c) { return __builtin_fma(a, b, c); }

FASTLOSS_HD inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTLOSS_HD inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FASTLOSS_HD inline float widen(BF16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// To nearest even, NaN quiet, and a subnormal number to zero: what the instructions of CPUs do.
FASTLOSS_HD inline BF16 to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7f800000) == 0) return {static_cast<uint16_t>(bits >> 16 & 0x8000)};
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

FASTLOSS_HD inline float widen(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)
    return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13) | (magnitude > 0x7c00 ? 0x400000 : 0));
  // The exponent field of a half, read as the one of a float, is 112 too small; the product is exact, subnormals included.
  return float_of(sign | float_bits(float_of(magnitude << 13) * 0x1p+112f));
}

FASTLOSS_HD inline F16 to_f16(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000;
  const uint32_t magnitude = float_bits(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // A subnormal half: adding 0.5 leaves it, rounded to nearest even, in the low bits.
    return {static_cast<uint16_t>(sign | (float_bits(float_of(magnitude) + 0.5f) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13))};
}

FASTLOSS_HD inline float widen(float x) { return x; }
FASTLOSS_HD inline double widen(double x) { return x; }

// A value of the accumulation type, rounded to the storage type.
template <class T>
FASTLOSS_HD T narrow(double x);
template <>
FASTLOSS_HD inline double narrow<double>(double x) {
  return x;
}
template <>
FASTLOSS_HD inline float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
FASTLOSS_HD inline BF16 narrow<BF16>(double x) {
  return to_bf16(static_cast<float>(x));
}
template <>
FASTLOSS_HD inline F16 narrow<F16>(double x) {
  return to_f16(static_cast<float>(x));
}

// load_first of a vector type that has no masks.
template <class V, class T>
inline typename V::Reg load_first_of_copy(const T* p, int n, typename V::Reg behind) {
  if (n >= V::kWidth) return V::load(p);
  typename V::T lane[V::kWidth];
  V::store(lane, behind);
  for (int i = 0; i < n; ++i) lane[i] = widen(p[i]);
  return V::load(lane);
}

// 2^(i/8), less i in the bits that k << 20 adds: the bits of 2^(k/8) are kEighths[k % 8] + (k << 20).
constexpr uint32_t kEighths[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                  0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

constexpr uint32_t kColumnFactor = 0x9e3779b1u;

// 31 random bits for a column: a hash with two rounds of multiplication, the row's second word between them. The high bits of
// the last product decide, which depend on all bits before it.
FASTLOSS_HD inline int32_t random_bits(uint32_t column, RandomKey key) {
  uint32_t x = (column * kColumnFactor) ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = x ^ (x >> 15) ^ key.second;
  return static_cast<int32_t>((x * 0x846ca68bu) >> 1);
}

constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)

struct ScalarF64;

struct ScalarF32 {
  using T = float;
  using Wide = ScalarF64;
  using Reg = float;
  static constexpr int kWidth = 1;
  static constexpr int kInFlight = 1;  // registers of exponentials at once (for_registers_in_flight)
  FASTLOSS_HD static Reg set(T x) { return x; }
  FASTLOSS_HD static T first(Reg a) { return a; }
  FASTLOSS_HD static Reg load(const float* p) { return *p; }
  FASTLOSS_HD static Reg load(const BF16* p) { return widen(*p); }
  FASTLOSS_HD static Reg load(const F16* p) { return widen(*p); }
  // The first n >= 1 elements, or all that a register holds; what lies behind them is not touched, and comes from `behind`.
  template <class T>
  FASTLOSS_HD static Reg load_first(const T* p, int, Reg /*behind*/) {
    return load(p);
  }
  FASTLOSS_HD static void store(float* p, Reg x) { *p = x; }
  // Past the caches, to a place aligned to what is written; fence() ends a run of them.
  template <class T>
  FASTLOSS_HD static void stream(T* p, Reg x) {
    store(p, x);
  }
  FASTLOSS_HD static void fence() {}
  FASTLOSS_HD static void store(BF16* p, Reg x) { *p = to_bf16(x); }
  FASTLOSS_HD static void store(F16* p, Reg x) { *p = to_f16(x); }
  FASTLOSS_HD static Reg add(Reg a, Reg b) { return a + b; }
  FASTLOSS_HD static Reg sub(Reg a, Reg b) { return a - b; }
  FASTLOSS_HD static Reg mul(Reg a, Reg b) { return a * b; }
  FASTLOSS_HD static Reg div(Reg a, Reg b) { return a / b; }
  FASTLOSS_HD static Reg fma(Reg a, Reg b, Reg c) { return fma_f32(a, b, c); }  // a * b + c, rounded once
  FASTLOSS_HD static Reg max(Reg a, Reg b) { return a > b ? a : b; }            // b where either is NaN
  FASTLOSS_HD static Reg abs(Reg a) { return __builtin_fabsf(a); }
  FASTLOSS_HD static Reg copy_sign(Reg a, Reg sign) { return __builtin_copysignf(a, sign); }
  FASTLOSS_HD static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) { return a > b ? yes : no; }
  FASTLOSS_HD static int count_greater(Reg a, Reg b) { return a > b; }
  FASTLOSS_HD static uint32_t mask_greater(Reg a, Reg b) { return a > b; }  // bit i: whether element i is greater
  // Element i: the random bits of `column` + i, a number below 2^31.
  FASTLOSS_HD static Reg random(uint32_t column, RandomKey key) { return static_cast<float>(random_bits(column, key)); }
  FASTLOSS_HD static Reg zero_where_zero(Reg x, Reg w) { return w == 0.0f ? 0.0f : x; }
  // Element i of the result is element i + kBy; what lies behind the last is anything.
  template <int kBy>
  FASTLOSS_HD static Reg shift_down(Reg a) {
    return a;
  }
  // 2^(k/8), k in the low bits of x.
  static Reg power_of_two(Reg x) { return float_of(kEighths[float_bits(x) & 7] + (float_bits(x) << 20)); }
};

struct ScalarF64 {
  using T = double;
  using Wide = ScalarF64;
  using Reg = double;
  static constexpr int kWidth = 1;
  static constexpr int kInFlight = 1;
  FASTLOSS_HD static Reg set(T x) { return x; }
  FASTLOSS_HD static T first(Reg a) { return a; }
  FASTLOSS_HD static Reg load(const double* p) { return *p; }
  FASTLOSS_HD static Reg load_first(const double* p, int, Reg /*behind*/) { return *p; }
  FASTLOSS_HD static void store(double* p, Reg x) { *p = x; }
  FASTLOSS_HD static void stream(double* p, Reg x) { *p = x; }
  FASTLOSS_HD static void fence() {}
  FASTLOSS_HD static Reg add(Reg a, Reg b) { return a + b; }
  FASTLOSS_HD static Reg sub(Reg a, Reg b) { return a - b; }
  FASTLOSS_HD static Reg mul(Reg a, Reg b) { return a * b; }
  FASTLOSS_HD static Reg div(Reg a, Reg b) { return a / b; }
  FASTLOSS_HD static Reg fma(Reg a, Reg b, Reg c) { return fma_f64(a, b, c); }
  FASTLOSS_HD static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  FASTLOSS_HD static Reg abs(Reg a) { return __builtin_fabs(a); }
  FASTLOSS_HD static Reg copy_sign(Reg a, Reg sign) { return __builtin_copysign(a, sign); }
  FASTLOSS_HD static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) { return a > b ? yes : no; }
  FASTLOSS_HD static int count_greater(Reg a, Reg b) { return a > b; }
  FASTLOSS_HD static uint32_t mask_greater(Reg a, Reg b) { return a > b; }
  FASTLOSS_HD static Reg random(uint32_t column, RandomKey key) { return random_bits(column, key); }
  FASTLOSS_HD static Reg zero_where_zero(Reg x, Reg w) { return w == 0.0 ? 0.0 : x; }
  template <int kBy>
  FASTLOSS_HD static Reg shift_down(Reg a) {
    return a;
  }
  // k of x = 2^k m with m between sqrt(1/2) and sqrt(2), for x >= 1.
  FASTLOSS_HD static Reg exponent(Reg x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return static_cast<double>((bits - kSqrtHalf) >> 52);
  }
  // 2^(k - 1023), k in the low bits of x; 0 for k = 0.
  FASTLOSS_HD static Reg power_of_two(Reg x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits <<= 52;
    __builtin_memcpy(&x, &bits, sizeof bits);
    return x;
  }
};

struct ScalarIsa {
  static constexpr const char* kName = "scalar";
  using F32 = ScalarF32;
  using F64 = ScalarF64;
};

}  // namespace
}  // namespace fastloss
