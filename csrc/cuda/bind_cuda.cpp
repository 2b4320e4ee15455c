// SPDX-License-Identifier: Apache-2.0
// Module _cuda: as _cpu, with the device and the stream of each call. Loads without a driver and without a GPU.
#include <optional>
#include <tuple>

#include "../bind.hpp"
#include "calls.hpp"
#include "kernel_table.hpp"
#include "linear.hpp"

namespace {

using cuda::Device;
using Places = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;  // slots of a token; count, columns, values

void bind_cross_entropy(const CrossEntropyCall& call, int reduction, std::optional<double> denominator, uintptr_t loss,
                        uintptr_t saved, uintptr_t scale, const Tensor& grad, const Upstream& upstream, bool as_with_gradient,
                        uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;  // a launch may wait for room in the queue
  check_call(call);
  cuda::cross_entropy(call, static_cast<Reduction>(reduction), denominator ? &*denominator : nullptr, pointer(loss),
                      pointer<SavedRow>(saved), pointer<double>(scale), grad, upstream, as_with_gradient,
                      pointer<char>(workspace), Device(device, stream));
}

void bind_cross_entropy_backward(const CrossEntropyCall& call, uintptr_t scale, uintptr_t saved, const Upstream& upstream,
                                 const std::tuple<uintptr_t, uintptr_t, uintptr_t>& expected, const Tensor& grad, int device,
                                 uintptr_t stream) {
  const py::gil_scoped_release release;
  check_call(call);
  const auto [made_for, next, surprised] = expected;
  cuda::cross_entropy_backward(call, pointer<const double>(scale), pointer<const SavedRow>(saved), upstream,
                               {pointer<const double>(made_for), pointer<double>(next), pointer<int32_t>(surprised)}, grad,
                               Device(device, stream));
}

void bind_soft_target_gradient(const CrossEntropyCall& call, uintptr_t scale, uintptr_t saved, const Upstream& upstream,
                               const Tensor& out, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  check_call(call);
  cuda::soft_target_gradient(call, pointer<const double>(scale), pointer<const SavedRow>(saved), upstream, out,
                             Device(device, stream));
}

void bind_statistics(const Tensor& logits, Targets target, int k, const Transform& z, const std::array<uintptr_t, 8>& out,
                     uintptr_t saved, uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  const StatsOutputs outputs{pointer(out[0]),          pointer(out[1]),          pointer(out[2]),
                             pointer(out[3]),          pointer(out[4]),          pointer(out[5]),
                             pointer<int64_t>(out[6]), pointer<int64_t>(out[7]), pointer<double>(saved)};
  target.k = k;
  check_call("logits", logits, target, z);
  cuda::statistics(logits, target, z, outputs, pointer<char>(workspace), Device(device, stream));
}

void bind_gradient(const Tensor& logits, uintptr_t saved, uintptr_t coefficients, Targets target, int k, uintptr_t g,
                   const Transform& z, const Tensor& grad, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  target.k = k;
  check_call("logits", logits, target, z);
  cuda::stats_gradient(logits, pointer<const SavedRow>(saved), pointer<const double>(coefficients), target,
                       pointer<const double>(g), z, grad, Device(device, stream));
}

void bind_reduce_tokens(int64_t tokens, int64_t classes, int dtype, const Targets& target, uintptr_t weight,
                        int64_t ignore_index, int reduction, std::optional<double> denominator, uintptr_t losses,
                        uintptr_t loss, uintptr_t scale, uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::reduce_tokens({tokens, classes, static_cast<Dtype>(dtype), target, pointer<const void>(weight), ignore_index,
                       static_cast<Reduction>(reduction)},
                      denominator ? &*denominator : nullptr, pointer<const double>(losses), pointer(loss),
                      pointer<double>(scale), pointer<double>(workspace), Device(device, stream));
}

void bind_cross_entropy_chunk(const CrossEntropyCall& call, uintptr_t scale, uintptr_t losses, bool wide, uintptr_t saved,
                              const Tensor& grad, uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  check_call(call);
  cuda::cross_entropy_chunk(call, pointer<const double>(scale), pointer(losses), wide, pointer<SavedRow>(saved), grad,
                            pointer<char>(workspace), Device(device, stream));
}

void bind_sample_chunk(const CrossEntropyCall& call, uintptr_t saved, const std::tuple<uintptr_t, double, uintptr_t>& random,
                       const Places& places, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  check_call(call);
  const auto [seed, threshold, token] = random;
  const auto [slots, count, columns, values] = places;
  cuda::sample_chunk(call, pointer<SavedRow>(saved),
                     {pointer<const int64_t>(seed), threshold, pointer<const int64_t>(token), slots, pointer<int64_t>(count),
                      pointer<int32_t>(columns), pointer(values)},
                     Device(device, stream));
}

fastloss::Entries entries_of(int64_t rows, const Places& places, uintptr_t factors, uintptr_t start, uintptr_t order) {
  const auto [slots, count, columns, values] = places;
  return {rows,
          slots,
          pointer<const int64_t>(count),
          pointer<const int32_t>(columns),
          pointer<const void>(values),
          pointer<const double>(factors),
          pointer<const int64_t>(start),
          pointer<const int64_t>(order)};
}

void bind_multiply(int64_t rows, const Places& places, uintptr_t factors, uintptr_t start, uintptr_t order, int dtype,
                   uintptr_t matrix, int64_t width, uintptr_t out, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::multiply(entries_of(rows, places, factors, start, order), static_cast<Dtype>(dtype), {pointer<char>(matrix), width},
                 {pointer<char>(out), width}, Device(device, stream));
}

void bind_row_sums(int64_t rows, const Places& places, uintptr_t factors, uintptr_t start, uintptr_t order, int dtype,
                   uintptr_t out, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::row_sums(entries_of(rows, places, factors, start, order), static_cast<Dtype>(dtype), {pointer<char>(out), 1},
                 Device(device, stream));
}

void bind_scale(uintptr_t numbers, int64_t count, int dtype, const Upstream& upstream, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::scale({pointer<char>(numbers), count}, static_cast<Dtype>(dtype), upstream, Device(device, stream));
}

}  // namespace

PYBIND11_MODULE(FASTLOSS_CUDA_MODULE, m, py::mod_gil_not_used()) {
  m.def("cross_entropy", &bind_cross_entropy);
  m.def("cross_entropy_backward", &bind_cross_entropy_backward);
  m.def("soft_target_gradient", &bind_soft_target_gradient);
  m.def("statistics", &bind_statistics);
  m.def("gradient", &bind_gradient);
  m.def("reduce_tokens", &bind_reduce_tokens);
  m.def("cross_entropy_chunk", &bind_cross_entropy_chunk);
  m.def("sample_chunk", &bind_sample_chunk);
  m.def("multiply", &bind_multiply);
  m.def("row_sums", &bind_row_sums);
  m.def("scale", &bind_scale);
  m.def("device_count", &cuda::device_count);
  m.def("workspace_bytes", [](const Tensor& logits, int device, uintptr_t stream) {
    return cuda::workspace_bytes(logits, Device(device, stream));
  });
  m.def("plan", [](const Tensor& logits, const Tensor& grad, int device, uintptr_t stream) {
    const cuda::Plan plan = cuda::plan_of(logits, grad, Device(device, stream));
    return py::make_tuple(plan.warps_per_row, plan.parts, plan.one_trip, plan.turns);
  });
  m.attr("REDUCTION_BYTES") = 2 * kSumBlocks * sizeof(double);
  m.attr("ARCHITECTURES") = FASTLOSS_CUDA_ARCHITECTURES;
}
