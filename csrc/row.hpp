// SPDX-License-Identifier: Apache-2.0
// The row algorithm: loops over one staged panel of a block (see staging.hpp), each short enough to read at a glance. O is
// Along<V> or Across<V>; numbers of rows come as arrays of O::kRows.
//
// Sums run in kLanes virtual lanes, lane i taking the classes i, i + kLanes, ..., and are merged by halving; how many lanes fit
// in one register decides nothing. So every instruction set and every layout gives the same bits.
#pragma once

#include "staging.hpp"

namespace fastloss {
namespace {

// The reference of a block of only -inf is 0, so that -inf - ref stays -inf.
template <class A>
FASTLOSS_HD inline A finite_reference(A max) {
  return max == -static_cast<A>(__builtin_huge_val()) ? A(0) : max;
}

template <class V>
FASTLOSS_HD inline typename V::Reg finite_references(typename V::Reg max) {
  return V::select_greater(max, V::set(-__builtin_huge_val()), max, V::set(0));
}

template <class O>
struct Lanes {
  using V = typename O::V;
  using Reg = typename V::Reg;
  static constexpr int kRegs = kLanes / O::kClasses;
  Reg reg[kRegs];

  // For a panel of n classes. With one class a register (Across), fewer classes than registers leave the others unset.
  Lanes(typename V::T start, int n) {
    for (int k = 0; k < touched(n); ++k) reg[k] = V::set(start);
  }

  // Lane i takes in lane i + half, then half of half, down to one. Lanes that no class touches would hold the start, which is
  // taken in at the first step alone: no sum is -0, and again it would change nothing.
  template <class Merge>
  void reduce(Merge merge, typename V::T start, int n, typename V::T* out) const {
    Reg r[kRegs / 2];
    if constexpr (O::kRows == 1) {
      for (int k = 0; k < kRegs / 2; ++k) r[k] = merge(reg[k], reg[k + kRegs / 2]);
    } else {
      int k = 0;
      do {  // there is a class
        r[k] = merge(reg[k], k + kRegs / 2 < touched(n) ? reg[k + kRegs / 2] : V::set(start));
        ++k;
      } while (k < kRegs / 2 && k < touched(n));
    }
#pragma GCC unroll 8
    for (int half = kRegs / 4; half >= 1; half /= 2) {
      const int pairs = O::kRows == 1 || touched(n) >= 2 * half ? half : touched(n) - half;
      for (int k = 0; k < pairs; ++k) r[k] = merge(r[k], r[k + half]);
    }
    O::store_per_row(out, halve<O::kClasses / 2>(r[0], merge));
  }

  void sum(int n, typename V::T* out) const { reduce(V::add, 0, n, out); }

 private:
  template <int kHalf, class Merge>
  static Reg halve(Reg r, Merge merge) {
    if constexpr (kHalf == 0) {
      return r;
    } else {
      return halve<kHalf / 2>(merge(r, V::template shift_down<kHalf>(r)), merge);
    }
  }

  static int touched(int n) { return O::kRows == 1 || n > kRegs ? kRegs : n; }
};

// Calls step(at, k) for each register of a panel of n classes: `at` is its first class, `k` its place in the virtual lanes.
// Registers that hold padding alone are left out, which changes no sum and no maximum. `group` is called before each kLanes
// classes.
template <class O, class Group, class Step>
inline void for_registers_from(int i, int n, Group group, Step step) {
  for (; i + kLanes <= n; i += kLanes) {
    group();
#pragma GCC unroll 16
    for (int k = 0; k < Lanes<O>::kRegs; ++k) step(i + k * O::kClasses, k);
  }
#pragma GCC unroll 16
  for (int k = 0; k < Lanes<O>::kRegs; ++k) {
    if (i + k * O::kClasses < n) {
      step(i + k * O::kClasses, k);
    } else if (O::kRows > 1) {
      break;
    }
  }
}

template <class O, class Group, class Step>
inline void for_registers(int n, Group group, Step step) {
  for_registers_from<O>(0, n, group, step);
}

// The same with each step in two halves: begin(at), and V::kInFlight registers later end(at, k, what begin returned). An
// exponential is a long chain of instructions, and a CPU looks ahead over two or three of them: halves of different registers
// in turn keep its units busy.
template <class O, class Group, class Begin, class End>
inline void for_registers_in_flight(int n, Group group, Begin begin, End end) {
  constexpr int kRegs = Lanes<O>::kRegs, kInFlight = O::V::kInFlight, kStep = kInFlight * O::kClasses;
  constexpr bool kWholeGroups = kInFlight % kRegs == 0;
  static_assert(kWholeGroups || kRegs % kInFlight == 0, "the place in the virtual lanes follows from the step");
  int i = 0;
  if (kInFlight > 1 && n >= kStep) {
    decltype(begin(0)) begun[kInFlight];
    const auto end_step = [&](auto then) {
      for (int g = 0; g < kInFlight / kRegs; ++g) group();
      const int lane = kWholeGroups ? 0 : i / O::kClasses;
#pragma GCC unroll 16
      for (int k = 0; k < kInFlight; ++k) {
        end(i + k * O::kClasses, (lane + k) % kRegs, begun[k]);
        then(k);
      }
    };
#pragma GCC unroll 16
    for (int k = 0; k < kInFlight; ++k) begun[k] = begin(k * O::kClasses);
    for (; i + 2 * kStep <= n; i += kStep) end_step([&](int k) { begun[k] = begin(i + kStep + k * O::kClasses); });
    end_step([](int) {});
    i += kStep;
  }
  const auto both = [&](int at, int k) { end(at, k, begin(at)); };
  if constexpr (kWholeGroups) {
    for_registers_from<O>(i, n, group, both);
  } else {
    for (; i < n; i += O::kClasses) both(i, i / O::kClasses % kRegs);
  }
}

template <class O, class T>
FASTLOSS_HD inline typename O::V::Reg load_at(const T* panel, int at) {
  return O::V::load(panel + at * O::kRows);
}

// The first class with the maximum of a row without NaN.
template <class V>
inline int first_of_max(const typename V::T* z, int n, typename V::T max) {
  constexpr uint32_t kAll = (uint64_t{1} << V::kWidth) - 1;
  const auto top = V::set(max);
  for (int at = 0; at < n; at += V::kWidth) {
    const uint32_t below = V::mask_greater(top, V::load(z + at));
    if (below != kAll) return at + __builtin_ctz(~below);
  }
  return n;
}

// Of the time for a block its maximum takes one share and its exponentials the others.
constexpr int kMaxShares = 1, kExpShares = Ahead::kShares - kMaxShares;

template <class O>
inline void row_max(const typename O::T* z, int n, Ahead& ahead, typename O::T* out) {
  using V = typename O::V;
  const auto lowest = -static_cast<typename O::T>(__builtin_huge_val());
  Lanes<O> top(lowest, n);
  for_registers<O>(
      n, [&] { ahead.fetch<typename O::T>(kMaxShares); },
      [&](int at, int k) { top.reg[k] = V::max(load_at<O>(z, at), top.reg[k]); });
  top.reduce(V::max, lowest, n, out);
}

// Widens one row of n adjacent classes to a panel, and takes its maximum on the way.
template <class O, class T>
inline void widen_with_max(const T* x, int n, Ahead& ahead, typename O::T* z, typename O::T* max) {
  using V = typename O::V;
  const auto lowest = -static_cast<typename O::T>(__builtin_huge_val());
  Lanes<O> top(lowest, n);
  const auto take = [&](int at, int k, typename V::Reg reg) {
    V::store(z + at, reg);
    top.reg[k] = V::max(reg, top.reg[k]);
  };
  const int whole = n / kLanes * kLanes;
  for_registers<O>(
      whole, [&] { ahead.fetch<typename O::T>(kMaxShares); }, [&](int at, int k) { take(at, k, V::load(x + at)); });
  for_registers_from<O>(whole, n, [] {}, [&](int at, int k) { take(at, k, V::load_first(x + at, n - at, V::set(lowest))); });
  top.reduce(V::max, lowest, n, max);
}

// The first half of exp(z - reference).
template <class V>
struct BegunExp {
  typename V::Reg x, shifted;
};

template <class O, class T>
inline BegunExp<typename O::V> begin_exp(const T* z, int at, typename O::V::Reg reference) {
  using V = typename O::V;
  const auto x = clamp_exponent<V>(V::sub(load_at<O>(z, at), reference));
  return {x, shift_exponent<V>(x)};
}

// A class that holds more than half of the block, perhaps of the row.
template <class A>
inline bool is_confident(A sum) {
  return sum >= 1 && sum < 2;
}

// `others` where the row is confident.
template <class O>
struct PanelSums {
  typename O::T sum[O::kRows], others[O::kRows], sum_x[O::kRows], sum_sq[O::kRows];
};

template <class O>
inline typename O::V::Reg power_at(const typename O::T* z, int at, typename O::V::Reg reference) {
  const BegunExp<typename O::V> begun = begin_exp<O>(z, at, reference);
  return exp_shifted<typename O::V>(begun.x, begun.shifted);
}

// sum e without the first class of the maximal logit, whose 1 would round the others away, in the lanes of sum e: that class
// touched one of their registers, which is added up again. They are a copy, so that those of the caller stay in registers.
template <class O>
inline void sum_of_others(const typename O::T* z, int n, typename O::T max, Lanes<O> lanes, typename O::T* out) {
  using V = typename O::V;
  typename O::T offset[V::kWidth];
  for (int j = 0; j < V::kWidth; ++j) offset[j] = j;
  const auto offsets = V::load(offset);
  const int top = first_of_max<V>(z, n, max), touched = top % kLanes / V::kWidth;
  auto again = V::set(0);
  for (int at = touched * V::kWidth; at < n; at += kLanes) {
    const auto e = power_at<O>(z, at, V::set(max));
    again = V::add(again, V::zero_where_zero(e, V::sub(V::set(top - at), offsets)));
  }
  for (int k = 0; k < Lanes<O>::kRegs; ++k) lanes.reg[k] = k == touched ? again : lanes.reg[k];
  lanes.sum(n, out);
}

// The same of rows side by side, whose top classes are in lanes of their own: of all classes.
template <class O>
inline void sums_of_others(const typename O::T* z, int n, const typename O::T* max, typename O::T* out) {
  using V = typename O::V;
  const auto reference = O::per_row(max);
  auto first = V::set(n);
  for (int at = n - 1; at >= 0; --at) first = V::select_greater(reference, load_at<O>(z, at), first, V::set(at));
  Lanes<O> lanes(0, n);
  for_registers<O>(
      n, [] {},
      [&](int at, int k) {
        const auto e = power_at<O>(z, at, reference);
        lanes.reg[k] = V::add(lanes.reg[k], V::zero_where_zero(e, V::sub(first, V::set(at))));
      });
  lanes.sum(n, out);
}

// sum e, sum e x, sum e^2 of each row, with x = z - ref and e = exp(x), which stays in `powers` with kKeep.
template <class O, bool kEntropy, bool kSquares, bool kKeep>
inline void exp_sums(const typename O::T* z, int n, const typename O::T* ref, Ahead& ahead, typename O::T* powers,
                     PanelSums<O>& out) {
  using V = typename O::V;
  Lanes<O> sum(0, n), sum_x(0, n), sum_sq(0, n);
  const auto reference = O::per_row(ref);
  const auto fetch = [&] { ahead.fetch<typename O::T>(kExpShares); };
  const auto begin = [&](int at) { return begin_exp<O>(z, at, reference); };
  for_registers_in_flight<O>(n, fetch, begin, [&](int at, int k, const BegunExp<V>& begun) {
    const auto e = exp_shifted<V>(begun.x, begun.shifted);
    if constexpr (kKeep) V::store(powers + at * O::kRows, e);
    sum.reg[k] = V::add(sum.reg[k], e);
    if constexpr (kEntropy) sum_x.reg[k] = V::fma(e, begun.x, sum_x.reg[k]);
    if constexpr (kSquares) sum_sq.reg[k] = V::fma(e, e, sum_sq.reg[k]);
  });
  sum.sum(n, out.sum);
  bool confident = false;
  for (int r = 0; r < O::kRows; ++r) confident |= is_confident(out.sum[r]);
  if constexpr (O::kRows == 1) {
    if (confident) sum_of_others<O>(z, n, *ref, sum, out.others);
  } else {
    if (confident) sums_of_others<O>(z, n, ref, out.others);
  }
  if constexpr (kEntropy) sum_x.sum(n, out.sum_x);
  if constexpr (kSquares) sum_sq.sum(n, out.sum_sq);
}

// sum w (z - ref) and sum w, or with q: sum w q (z - ref) and sum w q. A weight of 0 counts nothing, even where z is -inf.
template <class O, bool kSoft>
inline void weighted_sums(const typename O::T* z, const typename O::T* w, const typename O::T* q, int n,
                          const typename O::T* ref, typename O::T* weighted, typename O::T* weight) {
  using V = typename O::V;
  Lanes<O> sum(0, n), total(0, n);
  const auto reference = O::per_row(ref);
  for_registers<O>(
      n, [] {},
      [&](int at, int k) {
        auto factor = O::per_class(w + at);
        if constexpr (kSoft) factor = V::mul(factor, load_at<O>(q, at));
        const auto x = V::zero_where_zero(V::sub(load_at<O>(z, at), reference), factor);
        sum.reg[k] = V::fma(factor, x, sum.reg[k]);
        total.reg[k] = V::add(total.reg[k], factor);
      });
  sum.sum(n, weighted);
  total.sum(n, weight);
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

}  // namespace
}  // namespace fastloss
