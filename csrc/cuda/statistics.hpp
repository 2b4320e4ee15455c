// SPDX-License-Identifier: Apache-2.0
// The statistics of a row: sums of each thread over what it takes of the row, then of a warp, then of all warps.
//
// The warp keeps one maximum, so that sums of its lanes need no factor. The first of the maximal logits, whose exp(0) = 1 would
// round away the rest of a confident row, is counted (`owners`), not summed.
#pragma once

#include "fetch.hpp"

namespace fastloss {
namespace {

__device__ inline double exp_nonpositive(double x) { return exp_clamped<CudaF64>(clamp_exponent<CudaF64>(x)); }

// The first place of z that holds the number, which gives way to -inf; -1 where none does.
template <class A, int kSize>
__device__ inline int take_away(A number, A (&z)[kSize]) {
  int place = -1;
#pragma unroll
  for (int i = kSize - 1; i >= 0; --i) place = z[i] == number ? i : place;
#pragma unroll
  for (int i = 0; i < kSize; ++i) z[i] = i == place ? -static_cast<A>(__builtin_huge_val()) : z[i];
  return place;
}

// In float only within a run, by a short tree: what is added up over long rows is double.
template <class V, int kSize>
__device__ inline typename V::T sum_of_powers(const typename V::T (&z)[kSize], typename V::T ref) {
  constexpr int kChains = kSize < 4 ? 1 : 4;
  typename V::T sum[4] = {};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const auto e = exp_of<V>(z[i] - ref);
    sum[i % kChains] = i < kChains ? e : sum[i % kChains] + e;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class V, Form kForm, bool kAdjacent>
class Running {
 public:
  using A = typename V::T;

  // The largest of the logits that come next; whether it is the first of the largest so far.
  __device__ bool see(A top) {
    const bool raised = kAdjacent ? any_lane(top > max_) : top > max_;
    if (raised) raise(kAdjacent ? max_over_warp(top > max_ ? top : max_) : top);
    return raised && top == max_;
  }

  // z of the run, -inf where it has no element; `q` and `w` in full alone. Overwrites z; sets the largest aside where it is
  // among them.
  template <class R>
  __device__ void take(const Problem& p, const R& run, A (&z)[R::kSize], const A (&w)[R::kSize], const A (&q)[R::kSize],
                       bool& holds_largest) {
    const A ref = finite_reference(max_);
    if constexpr (kFull) {
      if (p.want & kWantWeighted) add_weighted<false, R::kSize>(z, w, q, ref, weighted_, weight_);
      if (p.soft.data) add_weighted<true, R::kSize>(z, w, q, ref, soft_, soft_weight_);
    }
    if (holds_largest) holds_largest = !set_aside(run, z);
    add_exponentials<R>(p, z, ref);
  }

  // Of the lanes of a warp together, or of this thread alone.
  __device__ Part part() const {
    Part out = {};
    const double owners = over_lanes(own_);
    out.max = max_;
    out.sum = over_lanes(sum_) + owners;
    out.rest = over_lanes(sum_) + (owners - 1.0);
    if (max_ == static_cast<A>(__builtin_huge_val())) out.sum = out.rest = __builtin_nan("");
    if constexpr (kMoments) {
      out.sum_x = over_lanes(sum_x_);
      out.sum_sq = over_lanes(sum_sq_) + owners;
    }
    if constexpr (kFull) {
      out.weighted = over_lanes(weighted_);
      out.weight = over_lanes(weight_);
      out.soft = over_lanes(soft_);
      out.soft_weight = over_lanes(soft_weight_);
    }
    const int64_t first = own_ != 0.0 ? argmax_ : kNowhere;
    out.argmax = kAdjacent ? min_over_warp(first) : first;
    return out;
  }

  static constexpr int64_t kNowhere = INT64_MAX;

 private:
  static constexpr bool kFull = kForm == Form::kFull, kMoments = kForm != Form::kPlain;

  __device__ static double over_lanes(double value) { return kAdjacent ? sum_over_warp(value) : value; }

  // A new maximum: what was summed so far moves over to it.
  __device__ void raise(A top) {
    const double shift = static_cast<double>(finite_reference(max_)) - static_cast<double>(top);
    if constexpr (kFull) {
      if (weight_ != 0.0) weighted_ += shift * weight_;
      if (soft_weight_ != 0.0) soft_ += shift * soft_weight_;
    }
    if (const double total = sum_ + own_; total != 0.0) {
      const double scale = exp_nonpositive(static_cast<double>(max_) - static_cast<double>(top));
      if constexpr (kMoments) {
        if (scale != 0.0) sum_x_ += shift * total;
        sum_x_ *= scale;
        sum_sq_ = (sum_sq_ + own_) * scale * scale;
      }
      sum_ = total * scale;
      own_ = 0.0;
    }
    max_ = top;
  }

  template <class R>
  __device__ bool set_aside(const R& run, A (&z)[R::kSize]) {
    const int place = take_away(max_, z);
    if (place < 0) return false;
    argmax_ = run.column(place);
    own_ = 1.0;
    return true;
  }

  template <class R>
  __device__ void add_exponentials(const Problem& p, const A (&z)[R::kSize], A ref) {
    if constexpr (!kMoments) {
      sum_ += sum_of_powers<V>(z, ref);
    } else {
      constexpr int kChains = R::kSize < 4 ? 1 : 4;
      A sum[4] = {}, sum_x[4] = {}, sum_sq[4] = {};
#pragma unroll
      for (int i = 0; i < R::kSize; ++i) {
        const int c = i % kChains;
        const A x = clamp_exponent<V>(z[i] - ref), e = exp_clamped<V>(x);
        sum[c] += e;
        if (!kFull || p.want & (kWantEntropy | kWantSumSq)) {
          sum_x[c] = V::fma(e, x, sum_x[c]);
          sum_sq[c] = V::fma(e, e, sum_sq[c]);
        }
      }
      sum_ += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      sum_x_ += (sum_x[0] + sum_x[1]) + (sum_x[2] + sum_x[3]);
      sum_sq_ += (sum_sq[0] + sum_sq[1]) + (sum_sq[2] + sum_sq[3]);
    }
  }

  // sum w q (z - ref) and sum w q. A weight of 0 counts nothing, even where z is -inf.
  template <bool kSoft, int kSize>
  __device__ static void add_weighted(const A (&z)[kSize], const A (&w)[kSize], const A (&q)[kSize], A ref, double& weighted,
                                      double& weight) {
    A sum = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const A factor = kSoft ? w[i] * q[i] : w[i];
      sum = V::fma(factor, V::zero_where_zero(z[i] - ref, factor), sum);
      total += factor;
    }
    weighted += sum;
    weight += total;
  }

  A max_ = -static_cast<A>(__builtin_huge_val());
  double sum_ = 0.0, own_ = 0.0;
  int64_t argmax_ = kNowhere;
  double sum_x_ = 0.0, sum_sq_ = 0.0;  // unless plain
  // Used in full alone.
  double weighted_ = 0.0, weight_ = 0.0, soft_ = 0.0, soft_weight_ = 0.0;
};

// The same from what was fetched of a row.
template <class V, Form kForm, bool kAdjacent>
class RowScan {
 public:
  using A = typename V::T;
  static constexpr A kMissing = -static_cast<A>(__builtin_huge_val());

  template <class R, class F>
  __device__ void take(const Problem& p, int64_t row, const R& fetched_run, const F& fetched) {
    bool holds_largest = false;
    if constexpr (!kFull) holds_largest = running_.see(fetched.template largest<A>());
    for_pieces<V, kForm == Form::kPlain ? 64 : 32>(fetched_run, fetched, [&](const auto& run, auto& z) {
      [[maybe_unused]] A derivative[sizeof(z) / sizeof(A)], w[sizeof(z) / sizeof(A)], q[sizeof(z) / sizeof(A)];
      if constexpr (kFull) {
        transform_run<V>(p, run, z, derivative);
        load_per_class(static_cast<const A*>(p.weight), run, w);
        load_any(p, p.soft, row, run, q);
        holds_largest = running_.see(largest_of(z));
      }
      running_.take(p, run, z, w, q, holds_largest);
    });
  }

  __device__ Part part() const { return running_.part(); }

 private:
  static constexpr bool kFull = kForm == Form::kFull;
  Running<V, kForm, kAdjacent> running_;
};

// Sums over the parts of a row, relative to its maximum; `others` leaves out the first part that holds the maximum. finish.hpp
// does the same over blocks of several rows; here the lanes of a warp share the parts of one.
struct MergedSums {
  double others, sum_x, sum_sq, weighted, weight, soft, soft_weight;
};

__device__ inline void merge(MergedSums& sums, const Part& part, double max, bool holds_max) {
  const double shift = finite_reference(part.max) - max;
  const double scale = part.max == max ? 1.0 : part.sum == 0.0 ? 0.0 : exp_nonpositive(part.max - max);
  if (!holds_max) sums.others += part.sum * scale;
  sums.sum_x += (part.sum_x + (scale == 0.0 ? 0.0 : shift * part.sum)) * scale;
  sums.sum_sq += part.sum_sq * scale * scale;
  sums.weighted += part.weight != 0.0 ? part.weighted + shift * part.weight : part.weighted;
  sums.soft += part.soft_weight != 0.0 ? part.soft + shift * part.soft_weight : part.soft;
  sums.weight += part.weight;
  sums.soft_weight += part.soft_weight;
}

// `top` is the first part that holds the maximum. A row of only -inf, or with +inf or NaN, gets NaN.
__device__ inline RowStats row_stats(const MergedSums& sums, const Part& top) {
  RowStats s = {};
  const bool valid = top.sum + sums.others >= 1.0;
  s.max = top.max;
  s.rest = valid ? top.rest + sums.others : __builtin_nan("");
  s.log_sum = log1p_nonnegative<CudaF64>(s.rest);
  const double inv_sum = 1.0 / (1.0 + s.rest);
  s.mean_x = sums.sum_x * inv_sum;
  s.sum_sq = sums.sum_sq * inv_sum * inv_sum;
  s.weighted = sums.weighted;
  s.weight = sums.weight;
  s.soft = sums.soft;
  s.soft_weight = sums.soft_weight;
  return s;
}

// The parts of a row become its statistics, known to all lanes: those of a warp where they share the row, else each its own.
template <bool kTogether>
__device__ inline RowStats merge_parts(const Part* parts, int count, int step) {
  const int lane = kTogether ? threadIdx.x % kWarp : 0, lanes = kTogether ? kWarp : 1;
  double max = -__builtin_huge_val();
  for (int i = lane; i < count; i += lanes) max = parts[i * step].max > max ? parts[i * step].max : max;
  if (kTogether) max = max_over_warp(max);
  int64_t top = count, argmax = INT64_MAX;
  for (int i = lane; i < count; i += lanes) {
    const Part& part = parts[i * step];
    if (part.max != max) continue;
    if (top == count) top = i;
    if (part.argmax < argmax) argmax = part.argmax;
  }
  if (kTogether) {
    top = min_over_warp(top);
    argmax = min_over_warp(argmax);
  }
  MergedSums sums = {};
  for (int i = lane; i < count; i += lanes) merge(sums, parts[i * step], max, i == top);
  if (kTogether) {
    sums = {sum_over_warp(sums.others), sum_over_warp(sums.sum_x), sum_over_warp(sums.sum_sq),     sum_over_warp(sums.weighted),
            sum_over_warp(sums.weight), sum_over_warp(sums.soft),  sum_over_warp(sums.soft_weight)};
  }
  RowStats stats = row_stats(sums, parts[top * step]);
  stats.argmax = stats.rest == stats.rest ? argmax : -1;
  return stats;
}

// What a plain row needs of a part. And the same for a warp together: all wait for it, so it takes few steps.
struct PlainPart {
  double max, sum, rest;
};

// Of kMost parts at most.
template <class V, int kMost>
__device__ inline RowStats merge_plain_parts(const PlainPart* parts, int count) {
  using A = typename V::T;
  constexpr int kOfLane = (kMost + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  A top[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int part = i * kWarp + lane;
    top[i] = part < count ? static_cast<A>(parts[part].max) : -static_cast<A>(__builtin_huge_val());
  }
  const A max = max_over_warp(largest_of(top));
  double rest = 0.0;
  bool found = false;  // the first part that holds the maximum, one of whose logits is left out
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int part = i * kWarp + lane;
    const uint32_t holders = lanes_where(part < count && top[i] == max);
    const bool first = !found && holders && first_bit(holders) == lane;
    found = found || holders;
    if (part >= count) continue;
    if (first) {
      rest += parts[part].rest;
    } else if (const double sum = parts[part].sum; sum != 0.0) {
      rest += top[i] == max ? sum : sum * exp_of<V>(top[i] - max);
    }
  }
  rest = sum_over_warp(rest);
  RowStats s = {};
  s.max = max;
  s.rest = rest >= 0.0 ? rest : __builtin_nan("");
  return s;
}

}  // namespace
}  // namespace fastloss
