// SPDX-License-Identifier: Apache-2.0
// The statistics of rows as they are, and the gradient from coefficients that the caller made: any loss is a formula over
// these.
#pragma once

#include "engine.hpp"

namespace fastloss {

// Where to write each statistic; null where it is not wanted. Numbers are of the accumulation type.
struct StatsOutputs {
  void* logprob = nullptr;    // [N, k]
  void* logsumexp = nullptr;  // [N], as all that follow
  void* entropy = nullptr;
  void* mean_logit = nullptr;
  void* sum_sq_prob = nullptr;
  void* max_prob = nullptr;
  int64_t* argmax = nullptr;
  int64_t* rank = nullptr;  // [N, k]
  double* saved = nullptr;  // [N, saved_width]: max, rest, 0, maxima of blocks
};

void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& outputs);

// coefficients: [N, 4] = a, b, c, d of GradientRow; g: [N, k].
void stats_gradient(const Tensor& logits, const double* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad);

}  // namespace fastloss
