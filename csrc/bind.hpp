// SPDX-License-Identifier: Apache-2.0
// What the modules share: tuples of Python become structures.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cfloat>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cross_entropy.hpp"
#include "layout.hpp"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Something has to stand where an empty array has no memory at all: a Tensor and Targets are there when their pointers are.
inline int64_t nothing;

int64_t integer(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

Dtype dtype(PyObject* code) {
  const int64_t value = integer(code);
  if (value < kF32 || value > kBF16) throw std::invalid_argument("unknown dtype code " + std::to_string(value));
  return static_cast<Dtype>(value);
}

double real(PyObject* number) {
  const double value = PyFloat_AsDouble(number);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// PyTorch has a null pointer for a tensor whose storage was freed behind its back.
void check_memory(const char* name, const void* data, int64_t elements) {
  if ((data && data != &nothing) || elements == 0) return;
  throw std::invalid_argument(std::string(name) + " has no memory: its storage was resized or freed, but it has " +
                              std::to_string(elements) + " elements");
}

// In the accumulation type neither the number nor its reciprocal may become 0 or infinite.
void check_range(const char* name, double value, Dtype logits) {
  const bool wide = logits == kF64;
  const double least = wide ? DBL_MIN : FLT_MIN;
  if (value >= least && value <= 1.0 / least) return;
  char text[160];
  snprintf(text, sizeof text, "%s must be between %.2g and %.2g for sums in %s, got %g", name, least, 1.0 / least,
           wide ? "float64" : "float32", value);
  throw std::invalid_argument(text);
}

// What Python cannot check at no cost.
void check_call(const char* logits_name, const Tensor& logits, const Targets& target, const Transform& z) {
  check_memory(logits_name, logits.data, row_count(logits) * logits.shape[logits.axis]);
  if (target) check_memory("target", target.data, row_count(logits) * target.k);
  check_range("temperature", 1.0 / z.inv_temperature, logits.dtype);
  if (z.softcap == 0.0) return;
  check_range("softcap", z.softcap, logits.dtype);
  check_range("temperature * softcap", z.softcap / z.inv_temperature, logits.dtype);
}

CrossEntropyCall call_of(const Tensor& logits, const Targets& target, const Tensor& soft_target, uintptr_t weight,
                         const Transform& z, int64_t ignore_index, double label_smoothing, double z_loss) {
  check_call("input", logits, target, z);
  if (soft_target) check_memory("target", soft_target.data, row_count(logits) * logits.shape[logits.axis]);
  return {logits, target, soft_target, pointer<const void>(weight), z, ignore_index, label_smoothing, z_loss};
}

// The items of a tuple, checked by their number alone: Python has built it.
template <size_t kItems>
bool unpack(py::handle tuple, std::array<PyObject*, kItems>& items) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kItems) return false;
  for (size_t i = 0; i < kItems; ++i) items[i] = PyTuple_GET_ITEM(tuple.ptr(), i);
  return true;
}

bool unpack(PyObject* tuple, std::vector<int64_t>& out) {
  if (!PyTuple_Check(tuple)) return false;
  out.resize(PyTuple_GET_SIZE(tuple));
  for (size_t i = 0; i < out.size(); ++i) out[i] = integer(PyTuple_GET_ITEM(tuple, i));
  return true;
}

}  // namespace

// Tuples become structures here: what pybind11 has for nested tuples takes longer than the kernel of a small loss.
namespace pybind11::detail {

template <>
struct type_caster<Tensor> {  // (pointer, dtype, shape, strides in elements, class axis), or None
  PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor"));
  bool load(handle source, bool) {
    std::array<PyObject*, 5> item;
    if (source.is_none()) return true;
    if (!unpack(source, item) || !unpack(item[2], value.shape) || !unpack(item[3], value.strides)) return false;
    value.data = pointer<char>(integer(item[0]));
    if (!value.data) value.data = reinterpret_cast<char*>(&nothing);
    value.dtype = dtype(item[1]);
    value.axis = static_cast<int>(integer(item[4]));
    return true;
  }
};

template <>
struct type_caster<Targets> {  // (pointer, itemsize), or None
  PYBIND11_TYPE_CASTER(Targets, const_name("Targets"));
  bool load(handle source, bool) {
    std::array<PyObject*, 2> item;
    if (source.is_none()) return true;
    if (!unpack(source, item)) return false;
    value.data = pointer(integer(item[0]));
    if (!value.data) value.data = &nothing;
    value.itemsize = static_cast<int>(integer(item[1]));
    return true;
  }
};

template <>
struct type_caster<Transform> {  // (temperature, softcap, bias pointer)
  PYBIND11_TYPE_CASTER(Transform, const_name("Transform"));
  bool load(handle source, bool) {
    std::array<PyObject*, 3> item;
    if (!unpack(source, item)) return false;
    value = {1.0 / real(item[0]), real(item[1]), pointer<const void>(integer(item[2]))};
    return true;
  }
};

template <>
struct type_caster<Upstream> {  // (pointer, dtype, step), or None
  PYBIND11_TYPE_CASTER(Upstream, const_name("Upstream"));
  bool load(handle source, bool) {
    std::array<PyObject*, 3> item;
    if (source.is_none()) return true;
    if (!unpack(source, item)) return false;
    value = {pointer<const void>(integer(item[0])), dtype(item[1]), integer(item[2])};
    return true;
  }
};

}  // namespace pybind11::detail
