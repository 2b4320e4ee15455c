// SPDX-License-Identifier: Apache-2.0
// What is done once for each row, in double and for several rows in one register: with few classes it would cost more than the
// classes do.
#pragma once

#include "row.hpp"

namespace fastloss {
namespace {

// Merges the partials of whole rows. If it is wanted, `argmax` is set to the first block with the maximum.
template <class V>
void finish_rows(const Pass& pass, const Partials& partials, int rows, RowStats* stats) {
  const int64_t blocks = block_count(pass);
  const auto zero = V::set(0), one = V::set(1), just_below_one = V::set(0x1.fffffffffffffp-1);
  for (int row = 0; row < rows; row += V::kWidth) {
    const auto part = [&](int64_t block, PartialField field) { return V::load(partials.row(block, field) + row); };
    auto max = part(0, kMax), top = zero;
    for (int64_t b = 1; b < blocks; ++b) {
      top = V::select_greater(part(b, kMax), max, V::set(static_cast<double>(b)), top);
      max = V::max(part(b, kMax), max);
    }
    auto top_sum = zero, top_rest = zero, others = zero, sum_x = zero, sum_sq = zero;
    auto weighted = zero, weight = zero, soft = zero, soft_weight = zero;
    for (int64_t b = 0; b < blocks; ++b) {
      const auto block_max = part(b, kMax), sum = part(b, kSum);
      const auto shift = V::sub(finite_references<V>(block_max), max);
      auto scale = one;
      if (blocks > 1) {
        const auto smaller = V::zero_where_zero(exp_clamped<V>(clamp_exponent<V>(V::sub(block_max, max))), sum);
        scale = V::select_greater(max, block_max, smaller, one);
      }
      const auto from_top = V::abs(V::sub(V::set(static_cast<double>(b)), top));
      top_sum = V::select_greater(one, from_top, sum, top_sum);
      top_rest = V::select_greater(one, from_top, part(b, kRest), top_rest);
      others = V::add(others, V::zero_where_zero(V::mul(sum, scale), from_top));
      if (pass.want & (kWantEntropy | kWantSumSq)) {
        sum_x = V::add(sum_x, V::mul(V::add(part(b, kSumX), V::zero_where_zero(V::mul(shift, sum), scale)), scale));
      }
      if (pass.want & kWantSumSq) sum_sq = V::add(sum_sq, V::mul(V::mul(part(b, kSumSq), scale), scale));
      // No weight: no shift, even of a block of only -inf.
      const auto add_weighted = [&](PartialField value, PartialField by, typename V::Reg& to, typename V::Reg& total) {
        const auto w = part(b, by);
        to = V::add(to, V::add(part(b, value), V::zero_where_zero(V::mul(shift, w), w)));
        total = V::add(total, w);
      };
      if (pass.want & kWantWeighted) add_weighted(kWeighted, kWeight, weighted, weight);
      if (pass.want & kWantSoft) add_weighted(kSoft, kSoftWeight, soft, soft_weight);
    }
    // Neither NaN nor a row of only -inf: else NaN.
    const auto valid = V::add(top_sum, others);
    const auto rest = V::select_greater(valid, just_below_one, V::add(top_rest, others), V::set(__builtin_nan("")));
    const auto inv_sum = V::div(one, V::add(one, rest));
    const auto scatter = [&](typename V::Reg numbers, double RowStats::* field) {
      double lane[V::kWidth];
      V::store(lane, numbers);
      for (int r = 0; r < V::kWidth && row + r < rows; ++r) stats[row + r].*field = lane[r];
    };
    scatter(max, &RowStats::max);
    scatter(rest, &RowStats::rest);
    scatter(log1p_nonnegative<V>(rest), &RowStats::log_sum);
    if (pass.want & (kWantEntropy | kWantSumSq)) scatter(V::mul(sum_x, inv_sum), &RowStats::mean_x);
    if (pass.want & kWantSumSq) scatter(V::mul(V::mul(sum_sq, inv_sum), inv_sum), &RowStats::sum_sq);
    if (pass.want & kWantWeighted) {
      scatter(weighted, &RowStats::weighted);
      scatter(weight, &RowStats::weight);
    }
    if (pass.want & kWantSoft) {
      scatter(soft, &RowStats::soft);
      scatter(soft_weight, &RowStats::soft_weight);
    }
    double lane[V::kWidth];
    V::store(lane, top);
    for (int r = 0; r < V::kWidth && row + r < rows && (pass.want & kWantArgmax); ++r) {
      stats[row + r].argmax = static_cast<int64_t>(lane[r]);
    }
  }
}

}  // namespace
}  // namespace fastloss
