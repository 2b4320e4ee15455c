// SPDX-License-Identifier: Apache-2.0
// Module _cpu: pointers, shapes and options in, the GIL released, errors out; nothing else. Python has checked the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "bandwidth.hpp"
#include "bind.hpp"
#include "cross_entropy.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "parallel.hpp"
#include "products.hpp"
#include "recycled.hpp"
#include "stats.hpp"

namespace {

double bind_cross_entropy(const CrossEntropyCall& call, int reduction, std::optional<double> denominator, uintptr_t loss,
                          uintptr_t saved, const Tensor& grad, double upstream, py::handle sampled) {
  // Cast by hand: before pybind11 takes None for a null pointer, it has Python raise and drop an AttributeError.
  SampledGradient* const kept = sampled.is_none() ? nullptr : sampled.cast<SampledGradient*>();
  const py::gil_scoped_release release;
  check_call(call);
  return cross_entropy(call, static_cast<Reduction>(reduction), denominator ? &*denominator : nullptr, pointer(loss),
                       pointer<double>(saved), grad, upstream, kept);
}

void bind_cross_entropy_backward(const CrossEntropyCall& call, double scale, uintptr_t saved, const Upstream& upstream,
                                 const Tensor& grad) {
  const py::gil_scoped_release release;
  check_call(call);
  check_memory("the upstream gradient", upstream.data, upstream.step ? row_count(call.logits) : 1);
  cross_entropy_backward(call, scale, pointer<const double>(saved), upstream, grad);
}

void bind_soft_target_gradient(const CrossEntropyCall& call, double scale, uintptr_t saved, const Upstream& upstream,
                               const Tensor& out) {
  const py::gil_scoped_release release;
  check_call(call);
  check_memory("the upstream gradient", upstream.data, upstream.step ? row_count(call.logits) : 1);
  soft_target_gradient(call, scale, pointer<const double>(saved), upstream, out);
}

void bind_statistics(const Tensor& logits, Targets target, int k, const Transform& z, const std::array<uintptr_t, 8>& out,
                     uintptr_t saved) {
  const py::gil_scoped_release release;
  const StatsOutputs outputs{pointer(out[0]),          pointer(out[1]),          pointer(out[2]),
                             pointer(out[3]),          pointer(out[4]),          pointer(out[5]),
                             pointer<int64_t>(out[6]), pointer<int64_t>(out[7]), pointer<double>(saved)};
  target.k = k;
  check_call("logits", logits, target, z);
  statistics(logits, target, z, outputs);
}

void bind_gradient(const Tensor& logits, uintptr_t saved, uintptr_t coefficients, Targets target, int k, uintptr_t g,
                   const Transform& z, const Tensor& grad) {
  const py::gil_scoped_release release;
  target.k = k;
  check_call("logits", logits, target, z);
  stats_gradient(logits, pointer<const double>(saved), pointer<const double>(coefficients), target, pointer<const double>(g), z,
                 grad);
}

int64_t count_kept(const SampledGradient& sampled) {
  int64_t count = 0;
  for (const auto& row : sampled.rows) count += static_cast<int64_t>(row.size());
  return count;
}

SparseRows sparse_rows(int64_t rows, uintptr_t start, uintptr_t ids, uintptr_t values) {
  return {rows, pointer<int64_t>(start), pointer<int32_t>(ids), pointer(values)};
}

BlockProduct block_product(const std::array<uintptr_t, 2>& functions) {
  return {reinterpret_cast<decltype(BlockProduct::multiply)>(functions[0]),
          reinterpret_cast<decltype(BlockProduct::release)>(functions[1])};
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTLOSS_VERSION;
  info["compiler"] = FASTLOSS_COMPILER;
  info["flags"] = FASTLOSS_FLAGS;
  info["cuda"] = FASTLOSS_CUDA;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.attr("F32") = static_cast<int>(kF32);
  m.attr("F64") = static_cast<int>(kF64);
  m.attr("F16") = static_cast<int>(kF16);
  m.attr("BF16") = static_cast<int>(kBF16);
  m.attr("BLOCK") = kBlock;
  m.attr("SAVED_FIELDS") = kSavedFields;
  m.def("cross_entropy", &bind_cross_entropy);
  m.def("cross_entropy_backward", &bind_cross_entropy_backward);
  m.def("check_targets",
        [](const Targets& target, const std::vector<int64_t>& shape, int64_t classes, std::optional<int64_t> ignore_index) {
          int64_t count = 1;
          for (const int64_t extent : shape) count *= extent;
          check_memory("target", target.data, count);
          check_targets(target, shape, -1, classes, ignore_index ? &*ignore_index : nullptr);
        });
  m.def("soft_target_gradient", &bind_soft_target_gradient);
  m.def("statistics", &bind_statistics);
  m.def("gradient", &bind_gradient);
  py::class_<SampledGradient>(m, "SampledGradient")
      .def(py::init([](uint64_t seed, double threshold, uintptr_t token) {
        return SampledGradient{seed, threshold, pointer<const int64_t>(token), {}};
      }))
      .def("count", &count_kept)
      .def("collect", [](const SampledGradient& sampled, uintptr_t start, uintptr_t columns, uintptr_t values, bool wide) {
        const py::gil_scoped_release release;
        const auto rows = static_cast<int64_t>(sampled.rows.size());
        collect(sampled, wide ? kF64 : kF32, sparse_rows(rows, start, columns, values));
      });
  m.def("ordered_product", [](const Tensor& hidden, const Tensor& weight, uintptr_t bias, const Tensor& out) {
    const py::gil_scoped_release release;
    ordered_product(hidden, weight, pointer<const void>(bias), out);
  });
  m.def("product", [](const Tensor& left, const Tensor& right, const Tensor& out) {
    const py::gil_scoped_release release;
    product(left, right, ProductSums::kInBlocks, out);
  });
  m.def("add_product", [](const Tensor& left, const Tensor& right, bool add, const Tensor& out) {
    const py::gil_scoped_release release;
    product(left, right, add ? ProductSums::kAdded : ProductSums::kNew, out);
  });
  m.def("multiply",
        [](int64_t rows, uintptr_t start, uintptr_t ids, uintptr_t values, const Tensor& matrix, const Tensor& out) {
          const py::gil_scoped_release release;
          multiply(sparse_rows(rows, start, ids, values), matrix, out);
        });
  m.def("transpose", [](int64_t rows, uintptr_t start, uintptr_t ids, uintptr_t values, bool wide, int64_t columns,
                        uintptr_t out_start, uintptr_t out_ids, uintptr_t out_values) {
    const py::gil_scoped_release release;
    transpose(sparse_rows(rows, start, ids, values), wide ? kF64 : kF32, sparse_rows(columns, out_start, out_ids, out_values));
  });
  m.def("transposed_product", [](std::array<uintptr_t, 2> product, const Tensor& grad, const Tensor& hidden, uintptr_t total,
                                 bool add, const Tensor& rounded) {
    const py::gil_scoped_release release;
    transposed_product(block_product(product), grad, hidden, pointer<float>(total), add, rounded);
  });
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.attr("MOST_THREADS") = kMostThreads;
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
