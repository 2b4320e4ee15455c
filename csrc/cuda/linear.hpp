// SPDX-License-Identifier: Apache-2.0
// What linear cross-entropy asks of a GPU besides matrix products: the loss of some of the tokens, with a denominator that all
// of them share; and the sampled backward. As in calls.hpp nothing is waited for and nothing allocated.
#pragma once

#include "calls.hpp"
#include "problem.hpp"

namespace fastloss::cuda {

// The class ids of all tokens, or probabilities (no ids), and what their losses are divided by.
struct Tokens {
  int64_t tokens, classes;
  Dtype dtype;  // of the logits
  Targets target;
  const void* weight;
  int64_t ignore_index;
  Reduction reduction;
};

// scale = 1 / denominator; with `losses`, in double, also the reduced loss. `room` for 2 * kSumBlocks numbers.
void reduce_tokens(const Tokens& tokens, const double* denominator, const double* losses, void* loss, double* scale,
                   double* room, const Device& device);

// The losses of a chunk of tokens, in double if `wide`; `grad` may be empty, and is that of the sum of the losses times *scale.
void cross_entropy_chunk(const CrossEntropyCall& call, const double* scale, void* losses, bool wide, SavedRow* saved,
                         const Tensor& grad, char* workspace, const Device& device);

// The sampled gradient of the losses of a chunk, from what cross_entropy_chunk saved.
void sample_chunk(const CrossEntropyCall& call, SavedRow* saved, const Sample& sample, const Device& device);

// Matrices of one dtype.
void multiply(const Entries& entries, Dtype dtype, const Dense& matrix, const Dense& out, const Device& device);
void row_sums(const Entries& entries, Dtype dtype, const Dense& out, const Device& device);

// `count` numbers times one upstream gradient, in place; untouched where that is 1.
void scale(const Dense& numbers, Dtype dtype, const Upstream& upstream, const Device& device);

}  // namespace fastloss::cuda
