// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include <algorithm>
#include <stdexcept>

#include "plan.hpp"

namespace fastloss::cuda {

void reduce_tokens(const Tokens& tokens, const double* denominator, const double* losses, void* loss_out, double* scale,
                   double* room, const Device& device) {
  Problem p;
  p.rows = tokens.tokens;
  p.classes = tokens.classes;
  p.ids = {tokens.target.data, tokens.target.itemsize, 1};
  Loss loss;
  loss.ignore_index = tokens.ignore_index;
  loss.class_weight = tokens.weight;
  Sums sums;
  sums.losses = losses;
  sums.room = room;
  sums.scale = scale;
  sums.loss = loss_out;
  sums.loss_dtype = tokens.dtype == kF64 ? kF64 : kF32;
  sums.mean = tokens.reduction == Reduction::kMean;
  sums.divisor = divisor_of(denominator, tokens.reduction, !tokens.target, p.rows);
  sum_rows(p, loss, sums, device.stream());
}

void cross_entropy_chunk(const CrossEntropyCall& call, const double* scale, void* losses, bool wide, SavedRow* saved,
                         const Tensor& grad, char* memory, const Device& device) {
  if (grad) check_gradient(call.logits, grad);
  const KernelTable& kernels = table(call.logits.dtype);
  Problem p = loss_problem(call, grad);
  const bool one_trip = plan_loss(p, device.gpu(), static_cast<bool>(grad));
  p.part = Workspace(p, memory).parts;
  Loss loss = loss_of(call);
  loss.losses = losses;
  loss.wide = wide;
  loss.saved = saved;
  const GradientSource source{scale, {}, nullptr, nullptr, {}};
  one_trip ? kernels.one_trip(p, loss, source, device.stream()) : kernels.scan(p, loss, {}, device.stream());
  if (p.parts > 1 && !one_trip) kernels.merge(p, loss, {}, device.stream());
  if (grad && !one_trip) kernels.gradient(p, loss, source, saved, device.stream());
}

void sample_chunk(const CrossEntropyCall& call, SavedRow* saved, const Sample& sample, const Device& device) {
  if (!adjacent(call.logits)) throw std::invalid_argument("sampling needs logits whose classes lie side by side");
  Problem p = loss_problem(call, {});
  plan_blocks_of_rows(p);
  Loss loss = loss_of(call);
  loss.saved = saved;
  table(call.logits.dtype).sample(p, loss, sample, device.stream());
}

void multiply(const Entries& entries, Dtype dtype, const Dense& matrix, const Dense& out, const Device& device) {
  table(dtype).multiply(entries, matrix, out, device.stream());
}

void row_sums(const Entries& entries, Dtype dtype, const Dense& out, const Device& device) {
  table(dtype).row_sums(entries, out, device.stream());
}

void scale(const Dense& numbers, Dtype dtype, const Upstream& upstream, const Device& device) {
  constexpr int64_t kNumbersOfBlock = 64 * kThreads;
  const int64_t wanted = (numbers.width + kNumbersOfBlock - 1) / kNumbersOfBlock, most = 8 * device.gpu().multiprocessors;
  table(dtype).scale(numbers, {upstream.data, upstream.dtype, 0}, static_cast<int>(std::min(wanted, most)), device.stream());
}

}  // namespace fastloss::cuda
