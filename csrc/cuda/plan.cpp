// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../layout.hpp"

namespace fastloss::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kWarpBytes = kBatch * kWarp * kVectorBytes;  // what a warp loads at a time
constexpr int64_t kScanBytes = 8 * kWarpBytes;                 // that a warp takes of a row, at least, before others share it
constexpr int64_t kMostClasses = INT32_MAX - (1 << 20);        // a thread steps past the end of a row
constexpr int64_t kPartBytes = 16 * kWarpBytes;                // a row is split into no less
constexpr int64_t kMostParts = 64;                             // of a row whose parts are merged
constexpr int kBlocksOfMultiprocessor = 3;                     // at a time: for fewer in all, rows are split
constexpr int kMostTurns = 3, kLeastWaves = 8;                 // of blocks: the last of them leaves some of the GPU idle
constexpr int64_t kLeastStrided = 8, kMostStrided = 64;        // classes of a thread where they lie apart: more in a full block
constexpr int kMultiprocessorsOfBlock = 8;                     // of a cluster, at least: small GPUs may take none of 8

// The largest power of two that is at most `wanted`, as far as a block has warps.
void share_row(Problem& p, int64_t wanted) {
  p.warps_log2 = 0;
  while (2 << p.warps_log2 <= std::min<int64_t>(wanted, kThreads / kWarp)) ++p.warps_log2;
  p.warps_per_row = 1 << p.warps_log2;
}

// The most batches that a thread can have of one of so many parts of a row.
int batches_of(const Problem& p, int parts) {
  const int64_t vectors = p.classes * itemsize_of(p.logits.dtype) / kVectorBytes;
  const int64_t lines = (vectors + kLine - 1) / kLine, of_part = std::min(vectors, (lines + parts - 1) / parts * kLine);
  const int64_t of_batch = kBatch * kWarp * p.warps_per_row;
  return static_cast<int>(std::min<int64_t>((of_part + of_batch - 1) / of_batch, INT32_MAX / 2));
}

// Blocks that take a row in one trip, a cluster if there are several: the fewest that have room for all of it, beside as many
// others as there are registers for, and that leave at most a quarter of the GPU idle. 0 where no number does. Where there are
// fewer, the memory is idle between the loads and the stores of a block: that is for rows that are too long else.
int blocks_of_row(const Problem& p, const Gpu& gpu) {
  const int64_t bytes = p.classes * itemsize_of(p.logits.dtype);
  const bool clusters = gpu.clusters && have_clusters();
  const int64_t most = std::min<int64_t>({kMostOfCluster, bytes / kPartBytes, gpu.multiprocessors / kMultiprocessorsOfBlock});
  const bool full = form_of(p) == Form::kFull, whole = p.warps_per_row == kThreads / kWarp;
  const int at_once = blocks_for(itemsize_of(p.logits.dtype), full + !whole);
  for (int blocks = 1; blocks == 1 || (clusters && blocks <= most); ++blocks) {
    const int64_t shared = int64_t(batches_of(p, blocks)) * kBatchBytes + one_trip_bytes(full);
    const bool last = !clusters || blocks >= most;
    const bool fits = shared <= gpu.shared_of_block && shared * (last ? 1 : at_once) <= gpu.shared_of_multiprocessor;
    const bool fills = 4 * p.rows * blocks >= 3 * gpu.multiprocessors || bytes < 2 * kPartBytes;
    if (fits && fills) return blocks;
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
  if (p.classes > kMostClasses) {
    throw std::invalid_argument("rows of " + std::to_string(p.classes) + " classes: the kernels of a GPU take at most " +
                                std::to_string(kMostClasses));
  }
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

void plan(Problem& p, int multiprocessors) {
  const int64_t bytes = p.classes * itemsize_of(p.logits.dtype);
  constexpr int kWarps = kThreads / kWarp;
  const int64_t wanted = kBlocksOfMultiprocessor * multiprocessors;
  int64_t blocks, most_parts;
  if (p.adjacent) {
    share_row(p, bytes / kScanBytes);
    blocks = p.rows / (kWarps / p.warps_per_row);
    most_parts = bytes / kPartBytes;
  } else {
    // What is done once a row, each warp of it does: the fewer the better.
    const int64_t warps_for_all = kWarps * wanted / std::max<int64_t>(p.rows / kWarp, 1);
    share_row(p, std::clamp(warps_for_all, p.classes / kMostStrided, p.classes / kLeastStrided));
    blocks = p.rows / (kThreads / p.warps_per_row);
    most_parts = p.classes / (kLeastStrided * kWarps);
  }
  int64_t parts = 1;
  if (blocks < wanted) {
    parts = std::clamp<int64_t>(std::min(wanted / std::max<int64_t>(blocks, 1), most_parts), 1, kMostParts);
  }
  plan_parts(p, static_cast<int>(parts));
}

void plan_parts(Problem& p, int parts) {
  p.parts = parts;
  p.batches = p.adjacent ? std::min(kAhead, batches_of(p, parts)) : 0;
}

void plan_blocks_of_rows(Problem& p) {
  share_row(p, kThreads / kWarp);
  plan_parts(p, 1);
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
  plan(p, gpu.multiprocessors);
  if (!gradient) return false;
  if (!p.adjacent) return p.parts == 1;
  Problem one_trip = p;
  share_row(one_trip, p.classes * itemsize_of(p.logits.dtype) / kWarpBytes);
  const int blocks = blocks_of_row(one_trip, gpu);
  if (blocks == 0) return false;
  p = one_trip;
  p.parts = blocks;
  p.batches = batches_of(p, blocks);
  const int64_t groups = p.rows / (kThreads / kWarp / p.warps_per_row);
  const int64_t at_once = std::max<int64_t>(1, kBlocksOfMultiprocessor * gpu.multiprocessors / blocks);
  p.turns = static_cast<int>(std::clamp<int64_t>(groups / (kLeastWaves * at_once), 1, kMostTurns));
  return true;
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
  saved = reinterpret_cast<SavedRow*>(take(p.rows * sizeof(SavedRow)));
  sums = reinterpret_cast<double*>(take(2 * kSumBlocks * sizeof(double)));
  parts = reinterpret_cast<Part*>(take(p.parts > 1 ? p.rows * p.parts * p.warps_per_row * sizeof(Part) : 0));
  bytes = used;
}

}  // namespace fastloss::cuda
