// SPDX-License-Identifier: Apache-2.0
// The mathematics, once: exp, log1p, tanh, and the formulas of cross-entropy over the statistics of a row.
//
// Everything here is written in terms of a vector type V (see simd/scalar.hpp for the list of operations), fuses multiply and
// add exactly where fma stands, and gives the same bits for every V. The anonymous namespace keeps each compiled copy to its
// own object file: a copy compiled for AVX-512 must never be the one that the linker keeps for everybody.
#pragma once

#include "kernels.hpp"
#include "simd/scalar.hpp"

namespace fastloss {
namespace {

// exp(x) = 2^(k/S) 2^(f/S) with k = round(S x log2 e) and |f| <= 1/2. 2^(f/S) = 1 + f (c[0] + c[1] f + ...): minimax in the
// relative error, found by the Remez exchange. float32 has S = 8: a table of eight entries saves half of the polynomial.
template <class Number>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kTerms = 3;  // relative error 2^-25.2
  FASTLOSS_HD static constexpr float coefficient(int i) {
    constexpr float kCoefficients[kTerms] = {0x1.62e432p-4f, 0x1.ec0c32p-9f, 0x1.c6a004p-14f};
    return kCoefficients[i];
  }
  static constexpr float kScale = 0x1.715476p+3f;            // S log2 e
  static constexpr float kMagic = 0x1.8p+23f;                // x + kMagic holds round(x) in its low bits
  static constexpr float kLowest = -127.0f * 0x1.62e43p-1f;  // from here down the result is 0
};

template <>
struct ExpConstants<double> {
  static constexpr int kTerms = 11;  // relative error 2^-58
  FASTLOSS_HD static constexpr double coefficient(int i) {
    constexpr double kCoefficients[kTerms] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a4p-3,  0x1.c6b08d7049fe8p-5,
                                              0x1.3b2ab6fba011ap-7,  0x1.5d87fe78cd6dcp-10, 0x1.4309130ed8bc8p-13,
                                              0x1.ffcbfba97c6d7p-17, 0x1.62bfc79d7642ap-20, 0x1.b5267cea5f68ep-24,
                                              0x1.e61b4f5049cdcp-28, 0x1.e79ba5e93da52p-32};
    return kCoefficients[i];
  }
  static constexpr double kScale = 0x1.71547652b82fep+0;
  static constexpr double kMagic = 0x1.8p+52 + 1023.0;  // with the exponent bias
  static constexpr double kLowest = -1023.0 * 0x1.62e42fefa39efp-1;
};

// The floor that keeps -inf out of products with probabilities that are 0 anyway; NaN passes through.
template <class V>
FASTLOSS_HD inline typename V::Reg clamp_exponent(typename V::Reg x) {
  return V::max(V::set(ExpConstants<typename V::T>::kLowest), x);
}

// exp(x) in two halves, of which the first is short. For kLowest <= x <= 0 (and NaN): exp(0) is exactly 1, exp(kLowest) exactly
// 0. What lies below the smallest normal number has an absolute error below it.
template <class V>
FASTLOSS_HD inline typename V::Reg shift_exponent(typename V::Reg x) {
  using C = ExpConstants<typename V::T>;
  return V::fma(x, V::set(C::kScale), V::set(C::kMagic));
}

template <class V>
FASTLOSS_HD inline typename V::Reg exp_shifted(typename V::Reg x, typename V::Reg shifted) {
  using C = ExpConstants<typename V::T>;
  const auto minus_k = V::sub(V::set(C::kMagic), shifted);
  const auto f = V::fma(x, V::set(C::kScale), minus_k);
  auto p = V::set(C::coefficient(C::kTerms - 1));
#pragma GCC unroll 16
  for (int i = C::kTerms - 2; i >= 0; --i) p = V::fma(p, f, V::set(C::coefficient(i)));
  p = V::fma(p, f, V::set(1));
  // A multiplication, not an addition to the exponent: it keeps NaN.
  return V::mul(p, V::power_of_two(shifted));
}

template <class V>
FASTLOSS_HD inline typename V::Reg exp_clamped(typename V::Reg x) {
  return exp_shifted<V>(x, shift_exponent<V>(x));
}

// log(1 + r) for r >= 0 (and NaN), within 2 units in the last place: 1 + r = 2^k (1 + f), log(1 + f) = 2 artanh(f / (2 + f)).
template <class V>
FASTLOSS_HD inline typename V::Reg log1p_nonnegative(typename V::Reg r) {
  static_assert(sizeof(typename V::T) == 8, "in double");
  const auto one = V::set(1), two = V::set(2), infinity = V::set(__builtin_huge_val());
  const auto u = V::add(one, r);
  const auto k = V::exponent(u);
  const auto scale = V::power_of_two(V::sub(V::set(ExpConstants<double>::kMagic), k));
  // What 1 + r lost to rounding, at the scale of the mantissa.
  const auto lost = V::select_greater(one, r, V::sub(r, V::sub(u, one)), V::sub(one, V::sub(u, r)));
  const auto f = V::add(V::sub(V::mul(u, scale), one), V::mul(lost, scale));
  const auto s = V::div(f, V::add(two, f));
  const auto s2 = V::mul(s, s);
  auto series = V::set(0);
#pragma GCC unroll 16
  for (int i = 23; i >= 3; i -= 2) series = V::fma(series, s2, V::set(1.0 / i));
  const auto ln2_hi = V::set(0x1.62e42fee00000p-1), ln2_lo = V::set(0x1.a39ef35793c76p-33);
  // log(1 + f) = f - s (f - 2 s^2 series): the leading f stays exact.
  const auto tail = V::mul(s, V::sub(f, V::mul(V::mul(two, s2), series)));
  const auto log = V::add(V::mul(k, ln2_hi), V::sub(f, V::sub(tail, V::mul(k, ln2_lo))));
  return V::select_greater(infinity, r, log, r);
}

// tanh(y) and 1 - tanh(y)^2, without cancellation at either end.
template <class V>
struct TanhPair {
  typename V::Reg value, derivative;
};

template <class V>
FASTLOSS_HD inline TanhPair<V> tanh_with_derivative(typename V::Reg y) {
  using T = typename V::T;
  const auto one = V::set(1), two = V::set(2);
  const auto e = exp_clamped<V>(clamp_exponent<V>(V::mul(V::abs(y), V::set(-2))));
  const auto denominator = V::add(one, e);
  const auto large = V::div(V::sub(one, e), denominator);
  // Small arguments: (1 - e) / (1 + e) would cancel; sinh and cosh by their series do not.
  const auto y2 = V::mul(y, y);
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 8;
  auto sinh = V::set(0), cosh = V::set(0);
  double factorial[2 * kTerms + 1] = {1};
  for (int i = 1; i <= 2 * kTerms; ++i) factorial[i] = factorial[i - 1] * i;
#pragma GCC unroll 16
  for (int i = kTerms - 1; i >= 0; --i) {
    sinh = V::fma(sinh, y2, V::set(static_cast<T>(1 / factorial[2 * i + 1])));
    cosh = V::fma(cosh, y2, V::set(static_cast<T>(1 / factorial[2 * i])));
  }
  const auto small = V::div(V::mul(V::abs(y), sinh), cosh);
  const auto magnitude = V::select_greater(V::set(static_cast<T>(0.5)), V::abs(y), small, large);
  const auto derivative = V::div(V::mul(V::mul(two, two), e), V::mul(denominator, denominator));
  return {V::copy_sign(magnitude, y), derivative};
}

// ---- cross-entropy over the statistics of a row -----------------------------------------------------------------------------

struct CrossEntropyOptions {
  double label_smoothing = 0.0;
  double z_loss = 0.0;
};

// Row loss, class id y of weight w_y:  w_y ((1 - eps) (L - z_y) + z_loss L^2) + eps / V sum_j w_j (L - z_j)
// Row loss, soft targets q:            sum_j w_j ((1 - eps) q_j + eps / V) (L - z_j) + z_loss L^2
// Both are written with l = L - max = log1p(rest) and z - max, so that a common offset of the logits cancels before it can
// round.
FASTLOSS_HD inline double cross_entropy_of_id(const CrossEntropyOptions& o, int64_t classes, const RowStats& s, double target_z,
                                              double target_weight, SavedRow* saved) {
  const double l = s.log_sum;
  const double L = s.max + l;
  double mass = target_weight * (1.0 - o.label_smoothing);
  double loss = mass == 0.0 ? 0.0 * l : mass * (l - (target_z - s.max));  // no weight: nothing, even of a target at -inf
  if (o.label_smoothing != 0.0) {
    const double share = o.label_smoothing / static_cast<double>(classes);
    loss += share * (s.weight * l - s.weighted);
    mass += share * s.weight;
  }
  if (o.z_loss != 0.0) loss += target_weight * o.z_loss * L * L;
  *saved = {s.max, s.rest, mass};
  return loss;
}

FASTLOSS_HD inline double cross_entropy_of_soft_target(const CrossEntropyOptions& o, int64_t classes, const RowStats& s,
                                                       SavedRow* saved) {
  const double l = s.log_sum;
  const double L = s.max + l;
  const double share = o.label_smoothing / static_cast<double>(classes), own = 1.0 - o.label_smoothing;
  double loss = own == 0.0 ? 0.0 * l : own * (s.soft_weight * l - s.soft);
  double mass = own * s.soft_weight;
  if (o.label_smoothing != 0.0) {
    loss += share * (s.weight * l - s.weighted);
    mass += share * s.weight;
  }
  if (o.z_loss != 0.0) loss += o.z_loss * L * L;
  *saved = {s.max, s.rest, mass};
  return loss;
}

// Coefficients of the gradient of u * (row loss). `row_weight` is w_y for a class id and 1 for soft targets.
FASTLOSS_HD inline GradientRow cross_entropy_gradient(const CrossEntropyOptions& o, int64_t classes, const SavedRow& s,
                                                      double row_weight, bool soft, double u) {
  GradientRow row;
  row.max = s.max;
  row.rest = s.rest;
  row.a = s.mass;
  if (o.z_loss != 0.0) row.a += 2.0 * row_weight * o.z_loss * (s.max + log1p_nonnegative<ScalarF64>(s.rest));
  row.a *= u;
  row.mass = u * s.mass;
  if (o.label_smoothing != 0.0) row.d = -u * (o.label_smoothing / static_cast<double>(classes));
  if (soft) row.e = -u * (1.0 - o.label_smoothing);
  return row;
}

}  // namespace
}  // namespace fastloss
