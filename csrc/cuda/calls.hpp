// SPDX-License-Identifier: Apache-2.0
// The calls of csrc/cross_entropy.hpp and csrc/stats.hpp on a GPU: all pointers are the GPU's, nothing is waited for and
// nothing allocated. What a call needs besides its results comes as `workspace`.
#pragma once

#include <cuda_runtime.h>

#include "../cross_entropy.hpp"
#include "../stats.hpp"
#include "problem.hpp"

namespace fastloss::cuda {

// What a plan asks of a GPU.
struct Gpu {
  int multiprocessors = 0;
  int shared_of_multiprocessor = 0, shared_of_block = 0;  // bytes of shared memory, at most
  int clusters = 0;                                       // whether it has clusters of blocks
};

// The GPU and the stream of a call. The GPU that was current before is so again at the end.
class Device {
 public:
  Device(int index, uintptr_t stream);
  cudaStream_t stream() const { return stream_; }
  const Gpu& gpu() const { return gpu_; }

 private:
  Gpu gpu_;
  cudaStream_t stream_;
};

int device_count();  // 0 without a driver

// How the threads of the GPU share the rows: warps of a block that share a row, blocks that do; whether they make loss and
// gradient in one trip, and how many rows they then take one after the other.
struct Plan {
  int warps_per_row, parts;
  bool one_trip;
  int turns;
};
// Of a plain cross-entropy; `grad` may be empty.
Plan plan_of(const Tensor& logits, const Tensor& grad, const Device& device);
size_t workspace_bytes(const Tensor& logits, const Device& device);

// `scale` becomes 1 / denominator, by which the gradient is multiplied: the one that the function of the CPU returns. The
// gradient is for one upstream gradient of all rows. A call `as_with_gradient` has the bits of one that makes it, even if it
// does not: last bits depend on how threads share a row.
void cross_entropy(const CrossEntropyCall& call, Reduction reduction, const double* denominator, void* loss, SavedRow* saved,
                   double* scale, const Tensor& grad, const Upstream& upstream, bool as_with_gradient, char* workspace,
                   const Device& device);
// Leaves `grad` as it is where it was made for the upstream gradient that came.
void cross_entropy_backward(const CrossEntropyCall& call, const double* scale, const SavedRow* saved, const Upstream& upstream,
                            const Expected& expected, const Tensor& grad, const Device& device);
void soft_target_gradient(const CrossEntropyCall& call, const double* scale, const SavedRow* saved, const Upstream& upstream,
                          const Tensor& out, const Device& device);
void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& outputs,
                char* workspace, const Device& device);
void stats_gradient(const Tensor& logits, const SavedRow* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad, const Device& device);

}  // namespace fastloss::cuda
