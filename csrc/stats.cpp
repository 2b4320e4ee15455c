// SPDX-License-Identifier: Apache-2.0
#include "stats.hpp"

namespace fastloss {

void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& out) {
  const int64_t classes = logits.shape[logits.axis];
  if (targets) check_targets(targets, row_count(logits), classes, nullptr);
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
  sweep.on_row = [&](int64_t row, const RowStats* s, const double* target_z, const int64_t* rank) {
    const double l = s->log_sum;
    const bool valid = s->rest == s->rest;
    for (int i = 0; targets && i < targets.k; ++i) {
      write(out.logprob, row * targets.k + i, (target_z[i] - s->max) - l);
      if (rank) out.rank[row * targets.k + i] = valid ? rank[i] : -1;
    }
    write(out.logsumexp, row, s->max + l);
    write(out.entropy, row, l - s->mean_x);
    write(out.mean_logit, row, valid ? s->max + s->weighted / static_cast<double>(classes) : s->rest);
    write(out.sum_sq_prob, row, valid ? s->sum_sq : s->rest);
    write(out.max_prob, row, 1.0 / (1.0 + s->rest));
    if (out.argmax) out.argmax[row] = s->argmax;
    if (out.saved) {
      out.saved[3 * row] = s->max;
      out.saved[3 * row + 1] = s->rest;
      out.saved[3 * row + 2] = 0.0;
    }
  };
  sweep.run();
}

void stats_gradient(const Tensor& logits, const double* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad) {
  Sweep sweep;
  sweep.pass.classes = logits.shape[logits.axis];
  sweep.pass.transform = transform;
  sweep.logits = logits;
  sweep.grad = grad;
  sweep.targets = targets;
  sweep.coefficients = [&](int64_t row, GradientRow& out, double* row_g) {
    const double* c = coefficients + 4 * row;
    out.max = saved[3 * row];
    out.rest = saved[3 * row + 1];
    out.a = c[0];
    out.b = c[1];
    out.c = c[2];
    out.d = c[3];
    for (int i = 0; targets && i < targets.k; ++i) row_g[i] = g[row * targets.k + i];
  };
  sweep.run();
}

}  // namespace fastloss
