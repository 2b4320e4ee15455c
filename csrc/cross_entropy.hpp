// SPDX-License-Identifier: Apache-2.0
// Cross-entropy with class ids or soft targets, forward and backward, over the formulas of numerics.hpp.
#pragma once

#include "engine.hpp"

namespace fastloss {

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

struct CrossEntropyCall {
  Tensor logits;
  Targets target;                // class ids, or
  Tensor soft_target;            // probabilities, of any dtype and strides
  const void* weight = nullptr;  // class weights of the accumulation type
  Transform transform;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  double z_loss = 0.0;
};

// Upstream gradient of the losses: `step` is 0 for one number that serves all rows.
struct Upstream {
  const void* data = nullptr;
  Dtype dtype = kF32;
  int64_t step = 0;
};

// Writes the losses (one number a row, or the reduced one) in the accumulation type, `saved` (max, rest and mass of each row,
// then the maxima of its blocks: saved_width(V) numbers; may be null) and the gradient in one trip over the logits: dense in
// `grad` (may be empty), or entries of it in `sampled` (may be null). The gradient is that of `upstream` times the sum of the
// rows over the denominator: the given one, or for the mean what has been counted, or 1; this is returned. Losses of single
// rows are not divided.
double cross_entropy(const CrossEntropyCall& call, Reduction reduction, const double* denominator, void* loss, double* saved,
                     const Tensor& grad, double upstream, SampledGradient* sampled);

void cross_entropy_backward(const CrossEntropyCall& call, double scale, const double* saved, const Upstream& upstream,
                            const Tensor& grad);

// The gradient by the soft targets.
void soft_target_gradient(const CrossEntropyCall& call, double scale, const double* saved, const Upstream& upstream,
                          const Tensor& out);

}  // namespace fastloss
