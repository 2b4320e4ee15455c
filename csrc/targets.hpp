// SPDX-License-Identifier: Apache-2.0
// The gradient at the targets of a tile: in double, several in one register.
#pragma once

#include "row.hpp"

namespace fastloss {
namespace {

// Ids that occur again in a row add up at their first place.
template <class Ids>
FASTLOSS_HD inline bool occurs_before(const Ids& id, int i) {
  for (int j = 0; j < i; ++j) {
    if (id[j] == id[i]) return true;
  }
  return false;
}

template <class Ids, class Upstreams>
FASTLOSS_HD inline double one_hot(const Ids& id, const Upstreams& g, int k, int i) {
  double sum = 0.0;
  for (int j = i; j < k; ++j) {
    if (id[j] == id[i]) sum += g[j];
  }
  return sum;
}

// The gradient at targets, in double and rounded once: p - 1 of a confident row would cancel, so there 1 - p is made from
// `rest`.
template <class V>
class TargetGradients {
 public:
  using Reg = typename V::Reg;

  // `z` is the logit of the target, `slope` dz/dx there.
  FASTLOSS_HD static Reg gradient(Reg z, Reg max, Reg rest, Reg a, Reg b, Reg c, Reg weighted_d, Reg slope, Reg one_hot) {
    const auto one = V::set(1), half = V::set(0.5);
    const auto x = clamp_exponent<V>(V::sub(z, finite_references<V>(max)));
    const auto e = exp_clamped<V>(x);
    const auto sum = V::add(one, rest);
    const auto p = V::div(e, sum);
    const auto one_minus_p = V::div(V::add(rest, V::sub(one, e)), sum);
    const auto confident = V::sub(V::sub(a, one_hot), V::mul(a, one_minus_p));
    const auto hit = V::select_greater(p, half, confident, V::sub(V::mul(a, p), one_hot));
    const auto curved = V::mul(p, V::add(V::mul(b, x), V::mul(c, p)));
    return V::mul(V::add(V::add(hit, curved), weighted_d), slope);
  }

  void add(const GradientRow& c, double z, double weight, double slope, double one_hot, double* out) {
    const double numbers[kFields] = {z, c.max, c.rest, c.a, c.b, c.c, weight * c.d, slope, one_hot};
    for (int f = 0; f < kFields; ++f) field_[f][count_] = numbers[f];
    out_[count_++] = out;
    if (count_ == kRoom) flush();
  }

  void flush() {
    for (int h = count_; h % V::kWidth != 0; ++h) {
      for (int f = 0; f < kFields; ++f) field_[f][h] = 0.0;
    }
    for (int h = 0; h < count_; h += V::kWidth) {
      typename V::Reg n[kFields];
      for (int f = 0; f < kFields; ++f) n[f] = V::load(field_[f] + h);
      double lane[V::kWidth];
      V::store(lane, gradient(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]));
      for (int i = 0; i < V::kWidth && h + i < count_; ++i) *out_[h + i] = lane[i];
    }
    count_ = 0;
  }

 private:
  static constexpr int kFields = 9;
  static constexpr int kRoom = 64;
  double field_[kFields][kRoom];
  double* out_[kRoom];
  int count_ = 0;
};

}  // namespace
}  // namespace fastloss
