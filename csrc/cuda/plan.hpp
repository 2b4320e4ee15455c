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

// Shares rows among warps, and among blocks where there are too few rows to fill the GPU.
void plan(Problem& p, int multiprocessors);
// The same rows in so many parts, each of them a block's.
void plan_parts(Problem& p, int parts);
// A block a row.
void plan_blocks_of_rows(Problem& p);

Problem loss_problem(const CrossEntropyCall& call, const Tensor& grad);
Loss loss_of(const CrossEntropyCall& call);

// The plan of a loss, or of loss and gradient; whether these take one trip, by one block or one cluster of blocks a row, whose
// shared memory keeps it.
bool plan_loss(Problem& p, const Gpu& gpu, bool gradient);

// What the sum of the losses is divided by; 0: by the weights of the rows that count.
double divisor_of(const double* denominator, Reduction reduction, bool soft, int64_t rows);
void check_gradient(const Tensor& logits, const Tensor& grad);

// The workspace of a call, from front to back.
struct Workspace {
  double* losses;  // [rows]
  SavedRow* saved;
  double* sums;  // [kSumBlocks][2]
  Part* parts;
  size_t bytes;

  Workspace(const Problem& p, char* memory);
};

}  // namespace fastloss::cuda
