// SPDX-License-Identifier: Apache-2.0
// Module _cuda: as _cpu, with the device and the stream of each call. Loads without a driver and without a GPU.
#include <optional>

#include "../bind.hpp"
#include "calls.hpp"

namespace {

using cuda::Device;

void bind_cross_entropy(const Tensor& logits, const Targets& target, const Tensor& soft_target, uintptr_t weight,
                        const Transform& z, int64_t ignore_index, double label_smoothing, double z_loss, int reduction,
                        std::optional<double> denominator, uintptr_t loss, uintptr_t saved, uintptr_t scale, const Tensor& grad,
                        uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;  // a launch may wait for room in the queue
  const CrossEntropyCall call{logits, target,       soft_target,     pointer<const void>(weight),
                              z,      ignore_index, label_smoothing, z_loss};
  cuda::cross_entropy(call, static_cast<Reduction>(reduction), denominator ? &*denominator : nullptr, pointer(loss),
                      pointer<double>(saved), pointer<double>(scale), grad, pointer<char>(workspace), Device(device, stream));
}

void bind_cross_entropy_backward(const Tensor& logits, const Targets& target, const Tensor& soft_target, uintptr_t weight,
                                 const Transform& z, int64_t ignore_index, double label_smoothing, double z_loss,
                                 uintptr_t scale, uintptr_t saved, const Upstream& upstream, const Tensor& grad, int device,
                                 uintptr_t stream) {
  const py::gil_scoped_release release;
  const CrossEntropyCall call{logits, target,       soft_target,     pointer<const void>(weight),
                              z,      ignore_index, label_smoothing, z_loss};
  cuda::cross_entropy_backward(call, pointer<const double>(scale), pointer<const double>(saved), upstream, grad,
                               Device(device, stream));
}

void bind_soft_target_gradient(const Tensor& logits, uintptr_t weight, const Transform& z, double label_smoothing,
                               uintptr_t scale, uintptr_t saved, const Upstream& upstream, const Tensor& out, int device,
                               uintptr_t stream) {
  const py::gil_scoped_release release;
  CrossEntropyCall call;
  call.logits = logits;
  call.weight = pointer<const void>(weight);
  call.transform = z;
  call.label_smoothing = label_smoothing;
  cuda::soft_target_gradient(call, pointer<const double>(scale), pointer<const double>(saved), upstream, out,
                             Device(device, stream));
}

void bind_statistics(const Tensor& logits, Targets target, int k, const Transform& z, const std::array<uintptr_t, 8>& out,
                     uintptr_t saved, uintptr_t workspace, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  const StatsOutputs outputs{pointer(out[0]),          pointer(out[1]),          pointer(out[2]),
                             pointer(out[3]),          pointer(out[4]),          pointer(out[5]),
                             pointer<int64_t>(out[6]), pointer<int64_t>(out[7]), pointer<double>(saved)};
  target.k = k;
  cuda::statistics(logits, target, z, outputs, pointer<char>(workspace), Device(device, stream));
}

void bind_gradient(const Tensor& logits, uintptr_t saved, uintptr_t coefficients, Targets target, int k, uintptr_t g,
                   const Transform& z, const Tensor& grad, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  target.k = k;
  cuda::stats_gradient(logits, pointer<const double>(saved), pointer<const double>(coefficients), target,
                       pointer<const double>(g), z, grad, Device(device, stream));
}

}  // namespace

PYBIND11_MODULE(FASTLOSS_CUDA_MODULE, m, py::mod_gil_not_used()) {
  m.def("cross_entropy", &bind_cross_entropy);
  m.def("cross_entropy_backward", &bind_cross_entropy_backward);
  m.def("soft_target_gradient", &bind_soft_target_gradient);
  m.def("statistics", &bind_statistics);
  m.def("gradient", &bind_gradient);
  m.def("device_count", &cuda::device_count);
  m.def("workspace_bytes", [](const Tensor& logits, int device, uintptr_t stream) {
    return cuda::workspace_bytes(logits, Device(device, stream));
  });
  m.def("plan", [](const Tensor& logits, int device, uintptr_t stream) {
    const cuda::Plan plan = cuda::plan_of(logits, Device(device, stream));
    return py::make_tuple(plan.threads, plan.warps_per_row, plan.parts);
  });
  m.attr("ARCHITECTURES") = FASTLOSS_CUDA_ARCHITECTURES;
}
