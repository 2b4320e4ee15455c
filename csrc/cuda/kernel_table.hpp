// SPDX-License-Identifier: Apache-2.0
// The launches that the rest of the module may ask for: a table for each storage type.
#pragma once

#include <cuda_runtime.h>

#include "problem.hpp"

namespace fastloss {

struct KernelTable {
  // Loss or statistics of all rows.
  void (*scan)(const Problem&, const Loss&, const Statistics&, cudaStream_t);
  // Loss and, if it has memory, gradient, by the plan of one trip: the parts of a row are the blocks of a cluster.
  void (*one_trip)(const Problem&, const Loss&, const GradientSource&, cudaStream_t);
  // What a scan of several parts a row left.
  void (*merge)(const Problem&, const Loss&, const Statistics&, cudaStream_t);
  // Needs what the scan saved.
  void (*rank)(const Problem&, const Statistics&, cudaStream_t);
  void (*gradient)(const Problem&, const Loss&, const GradientSource&, const SavedRow* saved, cudaStream_t);
  // Into p.grad, of any dtype.
  void (*soft_gradient)(const Problem&, const Loss&, const GradientSource&, const SavedRow* saved, cudaStream_t);
  // Of rows whose classes lie side by side, a block a row; needs loss.saved.
  void (*sample)(const Problem&, const Loss&, const Sample&, cudaStream_t);
  // out = entries times matrix.
  void (*multiply)(const Entries&, const Dense& matrix, const Dense& out, cudaStream_t);
  // The sum of each row, into out[rows].
  void (*row_sums)(const Entries&, const Dense& out, cudaStream_t);
  // One row times the upstream gradient, in place; nothing is read or written where that is 1.
  void (*scale)(const Dense&, const DeviceUpstream&, int blocks, cudaStream_t);
};

extern const KernelTable cuda_f32, cuda_f64, cuda_f16, cuda_bf16;

// Sums over rows in a fixed order: of losses (may be null) and of the weights of the rows that count, `room` for
// 2 * kSumBlocks numbers. Then scale = 1 / divisor, 0 where nothing counts; and the loss, whose mean is NaN there.
constexpr int kSumBlocks = 128;
struct Sums {
  const double* losses = nullptr;
  double* room = nullptr;
  double divisor = 0.0;  // 0: the sum of the weights
  bool mean = false;     // the loss is divided too
  double* scale = nullptr;
  void* loss = nullptr;  // of the accumulation type
  Dtype loss_dtype = kF32;
};
void sum_rows(const Problem&, const Loss&, const Sums&, cudaStream_t);

// Whether the kernels that the current GPU runs were compiled for one with clusters.
bool have_clusters();

}  // namespace fastloss
