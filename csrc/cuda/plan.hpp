// SPDX-License-Identifier: Apache-2.0
// A call becomes a Problem, and a plan of how threads share its rows.
#pragma once

#include "calls.hpp"
#include "kernel_table.hpp"

namespace fastloss::cuda {

const KernelTable& table(Dtype dtype);

// Whether the classes lie side by side.
bool adjacent(const Tensor& tensor);

Problem problem(const Tensor& logits, const Tensor& soft, const Tensor& grad, const Targets& targets,
                const Transform& transform);

constexpr int64_t kMostParts = 64;  // of a row whose parts are merged

// Shares rows among warps, and among blocks where there are too few rows to fill the GPU.
void plan(Problem& p, int multiprocessors, bool may_split, int64_t may_have_parts = kMostParts);

Problem loss_problem(const CrossEntropyCall& call, const Tensor& grad);
Loss loss_of(const CrossEntropyCall& call);

// The plan of a loss, or of loss and gradient; whether these take one trip, by one block or one cluster of blocks a row. With
// few rows that would leave most of the GPU idle.
bool plan_loss(Problem& p, const Gpu& gpu, bool gradient);

// What the sum of the losses is divided by; 0: by the weights of the rows that count.
double divisor_of(const double* denominator, Reduction reduction, bool soft, int64_t rows);
void check_gradient(const Tensor& logits, const Tensor& grad);

// The workspace of a call, from front to back.
struct Workspace {
  double* losses;  // [rows]
  double* saved;   // [rows][3]
  double* sums;    // [kSumBlocks][2]
  Part* parts;
  size_t bytes;

  Workspace(const Problem& p, char* memory);
};

}  // namespace fastloss::cuda
