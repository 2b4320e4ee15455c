// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../layout.hpp"

namespace fastloss::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kVector = 16;                      // bytes of a load
constexpr int64_t kWarpBytes = 4 * kWarp * kVector;  // what a warp loads at a time
constexpr int64_t kPartBytes = 16 * kWarpBytes;      // a row is split into no less
constexpr int kBlocksOfMultiprocessor = 2;           // fewer blocks than these: split the rows
constexpr int64_t kStridedClasses = 8;               // a thread's, at a time
constexpr int kMultiprocessorsOfBlock = 8;           // of a cluster, at least: small GPUs may take none of 8

// The largest power of two that is at most `value`, between 1 and `most`.
int power_of_two(int64_t value, int most) {
  int power = 1;
  while (2 * power <= std::min<int64_t>(value, most)) power *= 2;
  return power;
}

// The fewest blocks a row with which the rows in flight, one block a multiprocessor, take at most half of the L2 cache, and the
// last rows leave at most a quarter of the GPU idle; 0 where no number does, or there are no clusters. The other half is for
// the gradient, which goes through the cache as well where it has memory of its own; idle for a quarter of the time is still
// better than reading the row a second time. Where classes lie apart, 32 rows come at a time: short ones stay in the cache, and
// those of a large vocabulary would not in a cluster either.
int cluster_of(const Problem& p, const Gpu& gpu) {
  const int64_t bytes = p.classes * itemsize_of(p.logits.dtype);
  const int64_t most = std::min<int64_t>({kMostOfCluster, bytes / kPartBytes, gpu.multiprocessors / kMultiprocessorsOfBlock});
  if (!gpu.clusters || !p.adjacent || most < 2 || !have_clusters()) return 0;
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const int64_t at_once = gpu.multiprocessors / blocks, turns = (p.rows + at_once - 1) / at_once;
    const bool stays = 2 * std::min(p.rows, at_once) * bytes <= gpu.l2_bytes || 2 * blocks > most;
    const bool fills = 4 * p.rows * blocks >= 3 * turns * gpu.multiprocessors;
    if (stays && fills) return blocks;
  }
  return 0;
}

}  // namespace

const KernelTable& table(Dtype dtype) {
  switch (dtype) {
    case kF64:
      return cuda_f64;
    case kF16:
      return cuda_f16;
    case kBF16:
      return cuda_bf16;
    default:
      return cuda_f32;
  }
}

bool adjacent(const Tensor& tensor) { return !tensor || tensor.strides[tensor.axis] == 1 || tensor.shape[tensor.axis] == 1; }

Problem problem(const Tensor& logits, const Tensor& soft, const Tensor& grad, const Targets& targets,
                const Transform& transform) {
  const RowLayout layout(logits, soft, grad);
  const std::vector<RowLayout::Axis>& axes = layout.axes();
  if (axes.size() > kMaxAxes) {
    throw std::invalid_argument("the rows of the logits lie along " + std::to_string(axes.size()) +
                                " axes that cannot be merged, more than " + std::to_string(kMaxAxes));
  }
  Problem p;
  p.rows = row_count(logits);
  p.classes = logits.shape[logits.axis];
  p.axes = static_cast<int>(axes.size());
  for (int axis = 0; axis < p.axes; ++axis) p.extents[axis] = axes[axis].extent;
  const auto place = [&](const Tensor& tensor, RowLayout::Part part, Matrix& matrix) {
    if (!tensor) return;
    matrix.data = tensor.data;
    matrix.dtype = tensor.dtype;
    matrix.class_step = tensor.strides[tensor.axis];
    for (int axis = 0; axis < p.axes; ++axis) matrix.steps[axis] = axes[axis].stride[part];
  };
  place(logits, RowLayout::kLogits, p.logits);
  place(soft, RowLayout::kSoft, p.soft);
  place(grad, RowLayout::kGrad, p.grad);
  p.transform = transform;
  p.ids = {targets.data, targets.itemsize, targets ? targets.k : 0};
  p.adjacent = adjacent(logits) && adjacent(grad);
  return p;
}

void plan(Problem& p, int multiprocessors, bool may_split, int64_t may_have_parts) {
  const int64_t bytes = p.classes * itemsize_of(p.logits.dtype);
  int64_t blocks, most_parts;
  if (p.adjacent) {
    p.threads = may_split || is_full(p) ? kThreads : kOneTripThreads;
    p.warps_per_row = power_of_two(bytes / kWarpBytes, p.threads / kWarp);
    blocks = p.rows / (p.threads / kWarp / p.warps_per_row);
    most_parts = bytes / kPartBytes;
  } else {
    p.threads = kThreads;
    p.warps_per_row = power_of_two(p.classes / kStridedClasses, p.threads / kWarp);
    blocks = p.rows / (p.threads / p.warps_per_row);
    most_parts = p.classes / (kStridedClasses * p.threads / kWarp);
  }
  const int64_t wanted = kBlocksOfMultiprocessor * multiprocessors;
  if (may_split && blocks < wanted) {
    const int64_t parts = std::min(wanted / std::max<int64_t>(blocks, 1), most_parts);
    p.parts = static_cast<int>(std::clamp<int64_t>(parts, 1, may_have_parts));
  }
}

Problem loss_problem(const CrossEntropyCall& call, const Tensor& grad) {
  Problem p = problem(call.logits, call.soft_target, grad, call.target, call.transform);
  p.weight = call.label_smoothing != 0.0 || call.soft_target ? call.weight : nullptr;
  p.want = call.label_smoothing != 0.0 ? kWantWeighted : 0;
  return p;
}

Loss loss_of(const CrossEntropyCall& call) {
  Loss loss;
  loss.wanted = true;
  loss.ignore_index = call.ignore_index;
  loss.label_smoothing = call.label_smoothing;
  loss.z_loss = call.z_loss;
  loss.class_weight = call.weight;
  return loss;
}

bool plan_loss(Problem& p, const Gpu& gpu, bool gradient) {
  plan(p, gpu.multiprocessors, true);
  if (!gradient) return false;
  const int cluster = cluster_of(p, gpu);
  const bool one_trip = cluster > 0 || p.parts == 1;
  if (one_trip) {
    plan(p, gpu.multiprocessors, false);
    p.parts = std::max(cluster, 1);
  }
  return one_trip;
}

double divisor_of(const double* denominator, Reduction reduction, bool soft, int64_t rows) {
  if (denominator) return *denominator;
  return reduction != Reduction::kMean ? 1.0 : soft ? static_cast<double>(rows) : 0.0;
}

void check_gradient(const Tensor& logits, const Tensor& grad) {
  if (grad.dtype != logits.dtype) throw std::invalid_argument("the gradient must have the dtype of the logits");
}

Workspace::Workspace(const Problem& p, char* memory) {
  size_t used = 0;
  const auto take = [&](size_t size) {
    char* at = memory + used;
    used += size;
    return at;
  };
  losses = reinterpret_cast<double*>(take(p.rows * sizeof(double)));
  saved = reinterpret_cast<double*>(take(p.rows * 3 * sizeof(double)));
  sums = reinterpret_cast<double*>(take(2 * kSumBlocks * sizeof(double)));
  parts = reinterpret_cast<Part*>(take(p.parts > 1 ? p.rows * p.parts * p.warps_per_row * sizeof(Part) : 0));
  bytes = used;
}

}  // namespace fastloss::cuda
