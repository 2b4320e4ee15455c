// SPDX-License-Identifier: Apache-2.0
// The row algorithm over a vector type V: loops over one staged row of a block, each of them short enough to read at a glance.
//
// Sums run in kLanes virtual lanes, lane i taking the elements i, i + kLanes, ..., and are merged by halving; the vector width
// only decides how many lanes fit in one register. So every instruction set gives the same bits.
#pragma once

#include "staging.hpp"

namespace fastloss {
namespace {

template <class V>
struct Lanes {
  static constexpr int kRegs = kLanes / V::kWidth;
  typename V::Reg reg[kRegs];

  explicit Lanes(typename V::T start) {
    for (int k = 0; k < kRegs; ++k) reg[k] = V::set(start);
  }

  // Lane i takes in lane i + half, then half of half, down to one.
  template <class Merge>
  typename V::T reduce(Merge merge) const {
    typename V::Reg r[kRegs];
    for (int k = 0; k < kRegs; ++k) r[k] = reg[k];
    for (int half = kRegs / 2; half >= 1; half /= 2) {
      for (int k = 0; k < half; ++k) r[k] = merge(r[k], r[k + half]);
    }
    return V::first(halve<V::kWidth / 2>(r[0], merge));
  }

  double sum() const { return reduce(V::add); }

 private:
  template <int kHalf, class Merge>
  static typename V::Reg halve(typename V::Reg r, Merge merge) {
    if constexpr (kHalf == 0) {
      return r;
    } else {
      return halve<kHalf / 2>(merge(r, V::template shift_down<kHalf>(r)), merge);
    }
  }
};

// Calls step(at, k) for each register of a row of n elements: `at` is its place in the row, `k` that in the virtual lanes.
// Registers that hold padding alone are left out, which changes no sum and no maximum. `group` is called before each kLanes
// elements.
template <class V, class Group, class Step>
inline void for_registers(int n, Group group, Step step) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    group();
#pragma GCC unroll 64
    for (int k = 0; k < Lanes<V>::kRegs; ++k) step(i + k * V::kWidth, k);
  }
#pragma GCC unroll 64
  for (int k = 0; k < Lanes<V>::kRegs; ++k) {
    if (i + k * V::kWidth < n) step(i + k * V::kWidth, k);
  }
}

template <class V>
inline typename V::T row_max(const typename V::T* z, int n) {
  Lanes<V> top(-static_cast<typename V::T>(__builtin_huge_val()));
  for_registers<V>(n, [] {}, [&](int at, int k) { top.reg[k] = V::max(V::load(z + at), top.reg[k]); });
  return top.reduce(V::max);
}

// sum e, sum e x, sum e^2 over one row, with x = z - ref and e = exp(x). `ahead` is memory that the caller reads next.
template <class V, bool kEntropy, bool kSquares>
inline void exp_sums(const typename V::T* z, int n, typename V::T ref, const char* ahead, int ahead_bytes, Partial& out) {
  Lanes<V> sum(0), sum_x(0), sum_sq(0);
  const auto reference = V::set(ref);
  const auto fetch = [&] {
    for (int byte = 0; byte < ahead_bytes; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += ahead_bytes;
  };
  for_registers<V>(n, fetch, [&](int at, int k) {
    const auto x = clamp_exponent<V>(V::sub(V::load(z + at), reference));
    const auto e = exp_clamped<V>(x);
    sum.reg[k] = V::add(sum.reg[k], e);
    if constexpr (kEntropy) sum_x.reg[k] = V::fma(e, x, sum_x.reg[k]);
    if constexpr (kSquares) sum_sq.reg[k] = V::fma(e, e, sum_sq.reg[k]);
  });
  out.sum = sum.sum();
  out.sum_x = kEntropy ? sum_x.sum() : 0.0;
  out.sum_sq = kSquares ? sum_sq.sum() : 0.0;
}

// sum w (z - ref) and sum w, or with q: sum w q (z - ref) and sum w q. A weight of 0 counts nothing, even where z is -inf.
template <class V, bool kSoft>
inline void weighted_sums(const typename V::T* z, const typename V::T* w, const typename V::T* q, int n, typename V::T ref,
                          double& weighted, double& weight) {
  Lanes<V> sum(0), total(0);
  const auto reference = V::set(ref);
  for_registers<V>(
      n, [] {},
      [&](int at, int k) {
        auto factor = V::load(w + at);
        if constexpr (kSoft) factor = V::mul(factor, V::load(q + at));
        const auto x = V::zero_where_zero(V::sub(V::load(z + at), reference), factor);
        sum.reg[k] = V::fma(factor, x, sum.reg[k]);
        total.reg[k] = V::add(total.reg[k], factor);
      });
  weighted = sum.sum();
  weight = total.sum();
}

template <class V>
inline int64_t count_greater(const typename V::T* z, int n, typename V::T threshold) {
  int64_t count = 0;
  int i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) count += V::count_greater(V::load(z + i), V::set(threshold));
  for (; i < n; ++i) count += z[i] > threshold;
  return count;
}

// Classes of a block (columns first ... first + n) that come before `target` in a stable descending sort.
template <class V>
inline int64_t count_before(const typename V::T* z, int64_t first, int n, int64_t target, typename V::T target_z) {
  int64_t count = count_greater<V>(z, n, target_z);
  const int64_t equal_end = target - first < n ? target - first : n;
  for (int64_t j = 0; j < equal_end; ++j) count += z[j] == target_z;
  return count;
}

// grad_j = p_j (a + b x_j + c p_j) + w_j (d + e q_j), times dz/dx. The plain form has b = c = e = 0 and no weights.
template <class A>
struct GradientTerms {
  A ref, inv_sum, a, b, c, d, e;
  const A* weight;      // null: ones
  const A* soft;        // null: no soft targets
  const A* derivative;  // null: already in the coefficients
  bool plain() const { return b == 0 && c == 0 && !weight && !soft && !derivative; }
};

template <class V, bool kPlain>
inline typename V::Reg gradient_at(const GradientTerms<typename V::T>& t, const typename V::T* z, int i) {
  const auto x = clamp_exponent<V>(V::sub(V::load(z + i), V::set(t.ref)));
  const auto e = exp_clamped<V>(x);
  if constexpr (kPlain) return V::fma(e, V::set(t.a * t.inv_sum), V::set(t.d));
  const auto p = V::mul(e, V::set(t.inv_sum));
  auto g = V::mul(p, V::fma(V::set(t.c), p, V::fma(V::set(t.b), x, V::set(t.a))));
  auto share = V::set(t.d);
  if (t.soft) share = V::fma(V::set(t.e), V::load(t.soft + i), share);
  g = t.weight ? V::fma(V::load(t.weight + i), share, g) : V::add(g, share);
  return t.derivative ? V::mul(g, V::load(t.derivative + i)) : g;
}

// One row of n classes; `out` may be z itself. Nothing behind out + n is touched. `ahead` is memory that the caller reads next.
// With kStream the stores go past the caches, and `out` is aligned to a register.
template <class V, bool kPlain, bool kStream>
inline void gradient_row(const GradientTerms<typename V::T> terms, const typename V::T* z, int n, const char* ahead,
                         int ahead_bytes, typename V::T* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int byte = 0; byte < ahead_bytes; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += ahead_bytes;
#pragma GCC unroll 64
    for (int k = 0; k < kLanes; k += V::kWidth) {
      const auto g = gradient_at<V, kPlain>(terms, z, i + k);
      if constexpr (kStream) {
        V::stream(out + i + k, g);
      } else {
        V::store(out + i + k, g);
      }
    }
  }
  for (; i < n; i += V::kWidth) {
    typename V::T rest[V::kWidth];
    V::store(rest, gradient_at<V, kPlain>(terms, z, i));
    for (int j = 0; j < V::kWidth && i + j < n; ++j) out[i + j] = rest[j];
  }
}

}  // namespace
}  // namespace fastloss
