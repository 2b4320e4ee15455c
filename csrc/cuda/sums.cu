// SPDX-License-Identifier: Apache-2.0
// Sums over rows, in double and in one order: each block a stretch of rows, then one block the blocks.
#include "kernel_table.hpp"
#include "rows.hpp"

namespace fastloss {
namespace {

// Over the block, known to thread 0; a fixed tree.
__device__ inline double sum_over_block(double value) {
  FASTLOSS_SHARED(double[kThreads / kWarp], warps);
  __syncthreads();
  value = sum_over_warp(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (const double warp : warps) total += warp;
  return total;
}

template <class A>
FASTLOSS_KERNEL(kThreads, 1)
sum_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT Sums sums) {
  const int64_t begin = p.rows * blockIdx.x / gridDim.x, end = p.rows * (blockIdx.x + 1) / gridDim.x;
  double losses = 0.0, weights = 0.0;
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    if (sums.losses) losses += sums.losses[row];
    const Label<A> label = label_of<A>(p, loss, row);
    if (!p.ids.data || !label.ignored) weights += label.weight;
  }
  losses = sum_over_block(losses);
  weights = sum_over_block(weights);
  if (threadIdx.x != 0) return;
  sums.room[2 * blockIdx.x] = losses;
  sums.room[2 * blockIdx.x + 1] = weights;
}

FASTLOSS_KERNEL(kThreads, 1)
finish_sums_kernel(FASTLOSS_ARGUMENT Sums sums, int blocks) {
  const bool mine = static_cast<int>(threadIdx.x) < blocks;
  const double losses = sum_over_block(mine ? sums.room[2 * threadIdx.x] : 0.0);
  const double weights = sum_over_block(mine ? sums.room[2 * threadIdx.x + 1] : 0.0);
  if (threadIdx.x != 0) return;
  const double divisor = sums.divisor != 0.0 ? sums.divisor : weights;
  if (sums.scale) *sums.scale = divisor == 0.0 ? 0.0 : 1.0 / divisor;
  const double loss = !sums.mean ? losses : divisor == 0.0 ? __builtin_nan("") : losses / divisor;
  if (sums.loss_dtype == kF64) {
    write<double>(sums.loss, 0, loss);
  } else {
    write<float>(sums.loss, 0, loss);
  }
}

}  // namespace

void sum_rows(const Problem& p, const Loss& loss, const Sums& sums, cudaStream_t stream) {
  constexpr int64_t kRowsOfBlock = 4 * kThreads;
  const int64_t wanted = (p.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int blocks = static_cast<int>(wanted < kSumBlocks ? wanted : kSumBlocks);
  if (sums.loss_dtype == kF64) {
    launch(sum_kernel<double>, {blocks, 1, kThreads}, stream, p, loss, sums);
  } else {
    launch(sum_kernel<float>, {blocks, 1, kThreads}, stream, p, loss, sums);
  }
  launch(finish_sums_kernel, {1, 1, kThreads}, stream, sums, blocks);
}

bool have_clusters() { return compiled_for_clusters(finish_sums_kernel); }

}  // namespace fastloss
