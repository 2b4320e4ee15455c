// SPDX-License-Identifier: Apache-2.0
#include "stats.hpp"

#include "layout.hpp"

namespace fastloss {

void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& out) {
  const int64_t classes = logits.shape[logits.axis];
  if (targets) check_targets(targets, logits.shape, logits.axis, classes, nullptr);
  const bool wide = logits.dtype == kF64;
  const auto write = [wide](void* data, int64_t i, double value) {
    if (!data) return;
    if (wide) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  };
  Sweep sweep;
  sweep.pass.classes = classes;
  sweep.pass.transform = transform;
  sweep.pass.want = (out.entropy ? kWantEntropy : 0) | (out.sum_sq_prob ? kWantSumSq : 0) |
                    (out.mean_logit ? kWantWeighted : 0) | (out.argmax ? kWantArgmax : 0);
  sweep.logits = logits;
  sweep.targets = targets;
  sweep.want_rank = out.rank != nullptr;
  sweep.on_rows = [&](const Rows& rows, const RowStats* stats, const double* target_z, const int64_t* rank) {
    for (int r = 0; r < rows.count; ++r) {
      const int64_t row = rows.first + r;
      const RowStats& s = stats[r];
      const double l = s.log_sum;
      const bool valid = s.rest == s.rest;
      for (int i = 0; targets && i < targets.k; ++i) {
        const int64_t at = r * targets.k + i;
        write(out.logprob, row * targets.k + i, (target_z[at] - s.max) - l);
        if (out.rank) out.rank[row * targets.k + i] = valid ? rank[at] : -1;
      }
      write(out.logsumexp, row, s.max + l);
      write(out.entropy, row, l - s.mean_x);
      write(out.mean_logit, row, valid ? s.max + s.weighted / static_cast<double>(classes) : s.rest);
      write(out.sum_sq_prob, row, valid ? s.sum_sq : s.rest);
      write(out.max_prob, row, 1.0 / (1.0 + s.rest));
      if (out.argmax) out.argmax[row] = s.argmax;
      if (out.saved) {
        double* saved = out.saved + saved_width(classes) * row;
        *reinterpret_cast<SavedRow*>(saved) = {s.max, s.rest, 0.0};
        rows.copy_block_max(r, saved + kSavedFields);
      }
    }
  };
  sweep.run();
}

void stats_gradient(const Tensor& logits, const double* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad) {
  const SavedRows rows_saved(saved, logits.shape[logits.axis]);
  Sweep sweep;
  sweep.pass.classes = logits.shape[logits.axis];
  sweep.pass.transform = transform;
  sweep.logits = logits;
  sweep.grad = grad;
  sweep.targets = targets;
  sweep.coefficients = [&](const Rows& rows, GradientRow* out, double* row_g) {
    for (int r = 0; r < rows.count; ++r) {
      const int64_t row = rows.first + r;
      const double* c = coefficients + 4 * row;
      const SavedRow& s = rows_saved[row];
      out[r] = {s.max, s.rest, c[0], c[1], c[2], c[3], 0.0, false, rows_saved.block_max(row)};
      for (int i = 0; targets && i < targets.k; ++i) row_g[r * targets.k + i] = g[row * targets.k + i];
    }
  };
  sweep.run();
}

}  // namespace fastloss
