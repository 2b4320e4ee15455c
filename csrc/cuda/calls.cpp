// SPDX-License-Identifier: Apache-2.0
#include "calls.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../layout.hpp"
#include "kernel_table.hpp"

namespace fastloss::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kVector = 16;                      // bytes of a load
constexpr int64_t kWarpBytes = 4 * kWarp * kVector;  // what a warp loads at a time
constexpr int64_t kPartBytes = 16 * kWarpBytes;      // a row is split into no less
constexpr int kMostParts = 64;
constexpr int kBlocksOfMultiprocessor = 2;  // fewer blocks than these: split the rows
constexpr int64_t kStridedClasses = 8;      // a thread's, at a time

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

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

// The largest power of two that is at most `value`, between 1 and `most`.
int power_of_two(int64_t value, int most) {
  int power = 1;
  while (2 * power <= std::min<int64_t>(value, most)) power *= 2;
  return power;
}

Problem problem(const Tensor& logits, const Tensor& soft, const Tensor& grad, const Targets& targets,
                const Transform& transform) {
  std::vector<const Tensor*> tensors{&logits};
  std::vector<Matrix Problem::*> places{&Problem::logits};
  if (soft) tensors.push_back(&soft), places.push_back(&Problem::soft);
  if (grad) tensors.push_back(&grad), places.push_back(&Problem::grad);
  const RowLayout layout(tensors);
  if (layout.extents().size() > kMaxAxes) {
    throw std::invalid_argument("the rows of the logits lie along " + std::to_string(layout.extents().size()) +
                                " axes that cannot be merged, more than " + std::to_string(kMaxAxes));
  }
  Problem p;
  p.rows = row_count(logits);
  p.classes = logits.shape[logits.axis];
  p.axes = static_cast<int>(layout.extents().size());
  std::copy(layout.extents().begin(), layout.extents().end(), p.extents);
  for (size_t i = 0; i < tensors.size(); ++i) {
    Matrix& matrix = p.*places[i];
    matrix.data = tensors[i]->data;
    matrix.dtype = tensors[i]->dtype;
    matrix.class_step = tensors[i]->strides[tensors[i]->axis];
    for (int axis = 0; axis < p.axes; ++axis) matrix.steps[axis] = layout.stride(axis, i);
  }
  p.transform = transform;
  p.ids = {targets.data, targets.itemsize, targets ? targets.k : 0};
  p.adjacent = adjacent(logits) && adjacent(grad);
  return p;
}

// Shares rows among warps, and among blocks where there are too few rows to fill the GPU.
void plan(Problem& p, int multiprocessors, bool may_split) {
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
    p.parts = static_cast<int>(std::clamp<int64_t>(std::min(wanted / std::max<int64_t>(blocks, 1), most_parts), 1, kMostParts));
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

DeviceUpstream upstream_of(const Upstream& upstream) { return {upstream.data, upstream.dtype, upstream.step}; }

void check_gradient(const Tensor& logits, const Tensor& grad) {
  if (grad.dtype != logits.dtype) throw std::invalid_argument("the gradient must have the dtype of the logits");
}

// The workspace of a call, from front to back.
struct Workspace {
  double* losses;  // [rows]
  double* saved;   // [rows][3]
  double* sums;    // [kSumBlocks][2]
  Part* parts;
  size_t bytes;

  Workspace(const Problem& p, char* memory) {
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
};

}  // namespace

Device::Device(int index, uintptr_t stream) : index_(index), stream_(reinterpret_cast<cudaStream_t>(stream)) {
  check(cudaGetDevice(&before_), "no CUDA device");
  if (before_ != index_) check(cudaSetDevice(index_), "cudaSetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, index_), "cudaDeviceGetAttribute");
}

Device::~Device() {
  if (before_ != index_) cudaSetDevice(before_);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Plan plan_of(const Tensor& logits, const Device& device) {
  Problem p = problem(logits, {}, {}, {}, {});
  plan(p, device.multiprocessors(), true);
  return {p.threads, p.warps_per_row, p.parts};
}

size_t workspace_bytes(const Tensor& logits, const Device& device) {
  Problem p = problem(logits, {}, {}, {}, {});
  plan(p, device.multiprocessors(), true);
  size_t bytes = Workspace(p, nullptr).bytes;
  p.adjacent = !p.adjacent;  // as it is where the gradient lies otherwise
  plan(p, device.multiprocessors(), true);
  return std::max(bytes, Workspace(p, nullptr).bytes);
}

void cross_entropy(const CrossEntropyCall& call, Reduction reduction, const double* denominator, void* loss_out, double* saved,
                   double* scale, const Tensor& grad, char* memory, const Device& device) {
  if (grad) check_gradient(call.logits, grad);
  const cudaStream_t stream = device.stream();
  const KernelTable& kernels = table(call.logits.dtype);
  Problem p = loss_problem(call, grad);
  plan(p, device.multiprocessors(), true);
  // Few rows: one trip would leave most of the GPU idle.
  const bool one_trip = grad && p.parts == 1;
  if (one_trip) plan(p, device.multiprocessors(), false);
  const Workspace room(p, memory);
  p.part = room.parts;
  const bool reduced = reduction != Reduction::kNone;
  Loss loss = loss_of(call);
  loss.losses = reduced ? room.losses : loss_out;
  loss.wide = reduced;
  loss.saved = saved ? saved : grad ? room.saved : nullptr;

  Sums sums;
  sums.room = room.sums;
  sums.scale = scale;
  sums.loss_dtype = call.logits.dtype == kF64 ? kF64 : kF32;
  sums.mean = reduction == Reduction::kMean;
  sums.divisor = denominator ? *denominator : !sums.mean ? 1.0 : call.soft_target ? static_cast<double>(p.rows) : 0.0;
  const GradientSource source{scale, {}, nullptr, nullptr};
  if (one_trip) sum_rows(p, loss, sums, stream);  // the gradient asks for the denominator before the losses are there
  kernels.scan(p, loss, {}, one_trip ? &source : nullptr, stream);
  if (p.parts > 1) kernels.merge(p, loss, {}, stream);
  if (!one_trip || reduced) {
    sums.losses = reduced ? room.losses : nullptr;
    sums.loss = reduced ? loss_out : nullptr;
    sum_rows(p, loss, sums, stream);
  }
  if (grad && !one_trip) kernels.gradient(p, loss, source, loss.saved, stream);
}

void cross_entropy_backward(const CrossEntropyCall& call, const double* scale, const double* saved, const Upstream& upstream,
                            const Tensor& grad, const Device& device) {
  check_gradient(call.logits, grad);
  Problem p = loss_problem(call, grad);
  plan(p, device.multiprocessors(), true);
  table(call.logits.dtype).gradient(p, loss_of(call), {scale, upstream_of(upstream), nullptr, nullptr}, saved, device.stream());
}

void soft_target_gradient(const CrossEntropyCall& call, const double* scale, const double* saved, const Upstream& upstream,
                          const Tensor& out, const Device& device) {
  Problem p = problem(call.logits, {}, out, {}, call.transform);
  p.adjacent = adjacent(call.logits);  // what is written goes one by one anyway
  p.weight = call.weight;
  plan(p, device.multiprocessors(), true);
  table(call.logits.dtype)
      .soft_gradient(p, loss_of(call), {scale, upstream_of(upstream), nullptr, nullptr}, saved, device.stream());
}

void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& out, char* memory,
                const Device& device) {
  Problem p = problem(logits, {}, {}, targets, transform);
  p.want = (out.entropy ? kWantEntropy : 0) | (out.sum_sq_prob ? kWantSumSq : 0) | (out.mean_logit ? kWantWeighted : 0) |
           (out.argmax ? kWantArgmax : 0);
  plan(p, device.multiprocessors(), true);
  const Workspace room(p, memory);
  p.part = room.parts;
  const KernelTable& kernels = table(logits.dtype);
  const Statistics results{out.logprob,    out.logsumexp,   out.entropy,
                           out.mean_logit, out.sum_sq_prob, out.max_prob,
                           out.argmax,     out.rank,        out.saved ? out.saved : room.saved};
  kernels.scan(p, {}, results, nullptr, device.stream());
  if (p.parts > 1) kernels.merge(p, {}, results, device.stream());
  if (!out.rank) return;
  p.parts = 1;
  kernels.rank(p, results, device.stream());
}

void stats_gradient(const Tensor& logits, const double* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad, const Device& device) {
  check_gradient(logits, grad);
  if (grad.data == logits.data && targets && targets.k > 1) {
    throw std::invalid_argument("more than one target a row: the gradient needs memory of its own");
  }
  Problem p = problem(logits, {}, grad, targets, transform);
  plan(p, device.multiprocessors(), true);
  table(logits.dtype).gradient(p, {}, {nullptr, {}, coefficients, g}, saved, device.stream());
}

}  // namespace fastloss::cuda
