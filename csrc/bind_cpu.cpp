// SPDX-License-Identifier: Apache-2.0
// Module _cpu: pointers, shapes and options in, the GIL released, errors out; nothing else. Python has checked the arguments.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "bandwidth.hpp"
#include "cross_entropy.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"
#include "recycled.hpp"
#include "stats.hpp"

namespace py = pybind11;
using namespace fastloss;

namespace {

// (pointer, dtype, shape, strides in elements, class axis)
using TensorArgs = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, int>;
using TargetArgs = std::tuple<uintptr_t, int>;                // (pointer, itemsize)
using TransformArgs = std::tuple<double, double, uintptr_t>;  // (temperature, softcap, bias pointer)
using UpstreamArgs = std::tuple<uintptr_t, int, int64_t>;     // (pointer, dtype, step)

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Tensor tensor(const TensorArgs& args) {
  const auto& [address, dtype, shape, strides, axis] = args;
  // An empty tensor may have no memory at all; a Tensor is there when its pointer is.
  static char nothing[8];
  return {address ? pointer<char>(address) : nothing, static_cast<Dtype>(dtype), shape, strides, axis};
}

Tensor tensor(const std::optional<TensorArgs>& args) { return args ? tensor(*args) : Tensor{}; }

Targets targets(const std::optional<TargetArgs>& args, int k) {
  if (!args) return {};
  static int64_t nothing;
  const auto& [address, itemsize] = *args;
  return {address ? pointer<const void>(address) : &nothing, itemsize, k};
}

Transform transform(const TransformArgs& args) {
  const auto& [temperature, softcap, bias] = args;
  return {1.0 / temperature, softcap, pointer<const void>(bias)};
}

Upstream upstream(const UpstreamArgs& args) {
  const auto& [address, dtype, step] = args;
  return {pointer<const void>(address), static_cast<Dtype>(dtype), step};
}

double bind_cross_entropy(const TensorArgs& logits, const std::optional<TargetArgs>& target,
                          const std::optional<TensorArgs>& soft_target, uintptr_t weight, const TransformArgs& z,
                          int64_t ignore_index, double label_smoothing, double z_loss, int reduction,
                          std::optional<double> denominator, uintptr_t loss, uintptr_t saved,
                          const std::optional<TensorArgs>& grad) {
  const CrossEntropyCall call{tensor(logits), targets(target, 1), tensor(soft_target), pointer<const void>(weight),
                              transform(z),   ignore_index,       label_smoothing,     z_loss};
  const Tensor out = tensor(grad);
  const py::gil_scoped_release release;
  return cross_entropy(call, static_cast<Reduction>(reduction), denominator ? &*denominator : nullptr, pointer(loss),
                       pointer<double>(saved), out);
}

void bind_cross_entropy_backward(const TensorArgs& logits, const std::optional<TargetArgs>& target,
                                 const std::optional<TensorArgs>& soft_target, uintptr_t weight, const TransformArgs& z,
                                 int64_t ignore_index, double label_smoothing, double z_loss, double scale, uintptr_t saved,
                                 const UpstreamArgs& u, const TensorArgs& grad) {
  const CrossEntropyCall call{tensor(logits), targets(target, 1), tensor(soft_target), pointer<const void>(weight),
                              transform(z),   ignore_index,       label_smoothing,     z_loss};
  const Tensor out = tensor(grad);
  const py::gil_scoped_release release;
  cross_entropy_backward(call, scale, pointer<const double>(saved), upstream(u), out);
}

void bind_soft_target_gradient(const TensorArgs& logits, uintptr_t weight, const TransformArgs& z, double label_smoothing,
                               double scale, uintptr_t saved, const UpstreamArgs& u, const TensorArgs& out_args) {
  CrossEntropyCall call;
  call.logits = tensor(logits);
  call.weight = pointer<const void>(weight);
  call.transform = transform(z);
  call.label_smoothing = label_smoothing;
  const Tensor out = tensor(out_args);
  const py::gil_scoped_release release;
  soft_target_gradient(call, scale, pointer<const double>(saved), upstream(u), out);
}

void bind_statistics(const TensorArgs& logits, const std::optional<TargetArgs>& target, int k, const TransformArgs& z,
                     const std::array<uintptr_t, 8>& out, uintptr_t saved) {
  const StatsOutputs outputs{pointer(out[0]),          pointer(out[1]),          pointer(out[2]),
                             pointer(out[3]),          pointer(out[4]),          pointer(out[5]),
                             pointer<int64_t>(out[6]), pointer<int64_t>(out[7]), pointer<double>(saved)};
  const Tensor x = tensor(logits);
  const py::gil_scoped_release release;
  statistics(x, targets(target, k), transform(z), outputs);
}

void bind_gradient(const TensorArgs& logits, uintptr_t saved, uintptr_t coefficients, const std::optional<TargetArgs>& target,
                   int k, uintptr_t g, const TransformArgs& z, const TensorArgs& grad) {
  const Tensor x = tensor(logits), out = tensor(grad);
  const py::gil_scoped_release release;
  stats_gradient(x, pointer<const double>(saved), pointer<const double>(coefficients), targets(target, k),
                 pointer<const double>(g), transform(z), out);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTLOSS_VERSION;
  info["compiler"] = FASTLOSS_COMPILER;
  info["flags"] = FASTLOSS_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.attr("F32") = static_cast<int>(kF32);
  m.attr("F64") = static_cast<int>(kF64);
  m.attr("F16") = static_cast<int>(kF16);
  m.attr("BF16") = static_cast<int>(kBF16);
  m.def("cross_entropy", &bind_cross_entropy);
  m.def("cross_entropy_backward", &bind_cross_entropy_backward);
  m.def("soft_target_gradient", &bind_soft_target_gradient);
  m.def("statistics", &bind_statistics);
  m.def("gradient", &bind_gradient);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("use_torch_pool", [](uintptr_t parallel, uintptr_t count) {
    use_torch_pool(reinterpret_cast<TorchParallelFor>(parallel), reinterpret_cast<TorchGetNumThreads>(count));
  });
  m.def("build_info", &build_info);
  py::class_<RecycledBlock>(m, "RecycledBlock", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](RecycledBlock& block) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
      });
  m.def("release_recycled", &release_recycled);
  m.def("stream_read", [](uintptr_t data, size_t bytes) {
    const py::gil_scoped_release release;
    stream_read(pointer<const void>(data), bytes);
  });
  m.def("stream_update", [](uintptr_t data, size_t bytes) {
    const py::gil_scoped_release release;
    stream_update(pointer(data), bytes);
  });
  // FASTLOSS_ISA and FASTLOSS_NUM_THREADS are read here: a wrong value fails the import.
  kernels();
  get_num_threads();
}
