// SPDX-License-Identifier: Apache-2.0
#include "calls.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "plan.hpp"

namespace fastloss::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

DeviceUpstream upstream_of(const Upstream& upstream) { return {upstream.data, upstream.dtype, upstream.step}; }

}  // namespace

Device::Device(int index, uintptr_t stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {
  int current = 0;
  check(cudaGetDevice(&current), "no CUDA device");
  if (current != index) throw std::invalid_argument("the current CUDA device is another than that of the logits");
  const auto ask = [index](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
  };
  ask(gpu_.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(gpu_.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(gpu_.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(gpu_.clusters, cudaDevAttrClusterLaunch);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Plan plan_of(const Tensor& logits, const Tensor& grad, const Device& device) {
  Problem p = problem(logits, {}, grad, {}, {});
  const bool one_trip = plan_loss(p, device.gpu(), static_cast<bool>(grad));
  return {p.warps_per_row, p.parts, one_trip, p.turns};
}

size_t workspace_bytes(const Tensor& logits, const Device& device) {
  Problem p = problem(logits, {}, {}, {}, {});
  plan(p, device.gpu().multiprocessors);
  size_t bytes = Workspace(p, nullptr).bytes;
  p.adjacent = !p.adjacent;  // as it is where the gradient lies otherwise
  plan(p, device.gpu().multiprocessors);
  return std::max(bytes, Workspace(p, nullptr).bytes);
}

void cross_entropy(const CrossEntropyCall& call, Reduction reduction, const double* denominator, void* loss_out,
                   SavedRow* saved, double* scale, const Tensor& grad, const Upstream& upstream, bool as_with_gradient,
                   char* memory, const Device& device) {
  if (grad) check_gradient(call.logits, grad);
  if (grad && upstream.step != 0) throw std::invalid_argument("the upstream gradient must be one number for all rows");
  const cudaStream_t stream = device.stream();
  const KernelTable& kernels = table(call.logits.dtype);
  Problem p = loss_problem(call, grad);
  const bool one_trip = plan_loss(p, device.gpu(), as_with_gradient || grad);
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
  sums.divisor = divisor_of(denominator, reduction, static_cast<bool>(call.soft_target), p.rows);
  const GradientSource source{scale, upstream_of(upstream), nullptr, nullptr, {}};
  const bool at_once = one_trip && grad;
  if (at_once) sum_rows(p, loss, sums, stream);  // the gradient asks for the denominator before the losses are there
  one_trip ? kernels.one_trip(p, loss, source, stream) : kernels.scan(p, loss, {}, stream);
  if (p.parts > 1 && !one_trip) kernels.merge(p, loss, {}, stream);
  if (!at_once || reduced) {
    sums.losses = reduced ? room.losses : nullptr;
    sums.loss = reduced ? loss_out : nullptr;
    sum_rows(p, loss, sums, stream);
  }
  if (grad && !one_trip) kernels.gradient(p, loss, source, loss.saved, stream);
}

void cross_entropy_backward(const CrossEntropyCall& call, const double* scale, const SavedRow* saved, const Upstream& upstream,
                            const Expected& expected, const Tensor& grad, const Device& device) {
  check_gradient(call.logits, grad);
  Problem p = loss_problem(call, grad);
  plan(p, device.gpu().multiprocessors);
  const GradientSource source{scale, upstream_of(upstream), nullptr, nullptr, expected};
  table(call.logits.dtype).gradient(p, loss_of(call), source, saved, device.stream());
}

void soft_target_gradient(const CrossEntropyCall& call, const double* scale, const SavedRow* saved, const Upstream& upstream,
                          const Tensor& out, const Device& device) {
  Problem p = problem(call.logits, {}, out, {}, call.transform);
  p.adjacent = adjacent(call.logits);  // what is written goes one by one anyway
  p.weight = call.weight;
  plan(p, device.gpu().multiprocessors);
  table(call.logits.dtype)
      .soft_gradient(p, loss_of(call), {scale, upstream_of(upstream), nullptr, nullptr, {}}, saved, device.stream());
}

void statistics(const Tensor& logits, const Targets& targets, const Transform& transform, const StatsOutputs& out, char* memory,
                const Device& device) {
  Problem p = problem(logits, {}, {}, targets, transform);
  p.want = (out.entropy ? kWantEntropy : 0) | (out.sum_sq_prob ? kWantSumSq : 0) | (out.mean_logit ? kWantWeighted : 0) |
           (out.argmax ? kWantArgmax : 0);
  plan(p, device.gpu().multiprocessors);
  const Workspace room(p, memory);
  p.part = room.parts;
  const KernelTable& kernels = table(logits.dtype);
  const Statistics results{out.logprob,    out.logsumexp,   out.entropy,
                           out.mean_logit, out.sum_sq_prob, out.max_prob,
                           out.argmax,     out.rank,        out.saved ? reinterpret_cast<SavedRow*>(out.saved) : room.saved};
  kernels.scan(p, {}, results, device.stream());
  if (p.parts > 1) kernels.merge(p, {}, results, device.stream());
  if (!out.rank) return;
  plan_parts(p, 1);
  kernels.rank(p, results, device.stream());
}

void stats_gradient(const Tensor& logits, const SavedRow* saved, const double* coefficients, const Targets& targets,
                    const double* g, const Transform& transform, const Tensor& grad, const Device& device) {
  check_gradient(logits, grad);
  if (grad.data == logits.data && targets && targets.k > 1) {
    throw std::invalid_argument("more than one target a row: the gradient needs memory of its own");
  }
  Problem p = problem(logits, {}, grad, targets, transform);
  plan(p, device.gpu().multiprocessors);
  table(logits.dtype).gradient(p, {}, {nullptr, {}, coefficients, g, {}}, saved, device.stream());
}

}  // namespace fastloss::cuda
