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

void check_call(const CrossEntropyCall& call) {
  check_call("input", call.logits, call.target, call.transform);
  if (call.soft_target)
    check_memory("target", call.soft_target.data, row_count(call.logits) * call.logits.shape[call.logits.axis]);
}

// The items of a tuple, checked by their number alone: Python has built it.
template <size_t kItems>
bool unpack(py::handle tuple, std::array<PyObject*, kItems>& items) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kItems) return false;
  for (size_t i = 0; i < kItems; ++i) items[i] = PyTuple_GET_ITEM(tuple.ptr(), i);
  return true;
}

bool read(py::handle tuple, std::vector<int64_t>& out) {
  if (!PyTuple_Check(tuple.ptr())) return false;
  out.resize(PyTuple_GET_SIZE(tuple.ptr()));
  for (size_t i = 0; i < out.size(); ++i) out[i] = integer(PyTuple_GET_ITEM(tuple.ptr(), i));
  return true;
}

// (pointer, dtype, shape, strides in elements, class axis), or None
bool read(py::handle source, Tensor& out) {
  std::array<PyObject*, 5> item;
  if (source.is_none()) return true;
  if (!unpack(source, item) || !read(item[2], out.shape) || !read(item[3], out.strides)) return false;
  out.data = pointer<char>(integer(item[0]));
  if (!out.data) out.data = reinterpret_cast<char*>(&nothing);
  out.dtype = dtype(item[1]);
  out.axis = static_cast<int>(integer(item[4]));
  return true;
}

// (pointer, itemsize), or None
bool read(py::handle source, Targets& out) {
  std::array<PyObject*, 2> item;
  if (source.is_none()) return true;
  if (!unpack(source, item)) return false;
  out.data = pointer(integer(item[0]));
  if (!out.data) out.data = &nothing;
  out.itemsize = static_cast<int>(integer(item[1]));
  return true;
}

// (temperature, softcap, bias pointer)
bool read(py::handle source, Transform& out) {
  std::array<PyObject*, 3> item;
  if (!unpack(source, item)) return false;
  out = {1.0 / real(item[0]), real(item[1]), pointer<const void>(integer(item[2]))};
  return true;
}

// (pointer, dtype, step), or None
bool read(py::handle source, Upstream& out) {
  std::array<PyObject*, 3> item;
  if (source.is_none()) return true;
  if (!unpack(source, item)) return false;
  out = {pointer<const void>(integer(item[0])), dtype(item[1]), integer(item[2])};
  return true;
}

// (logits, ids, probabilities, class weight pointer, transform, ignored id, label smoothing, z-loss)
bool read(py::handle source, CrossEntropyCall& out) {
  std::array<PyObject*, 8> item;
  if (!unpack(source, item) || !read(item[0], out.logits) || !read(item[1], out.target) || !read(item[2], out.soft_target) ||
      !read(item[4], out.transform)) {
    return false;
  }
  out.weight = pointer<const void>(integer(item[3]));
  out.ignore_index = integer(item[5]);
  out.label_smoothing = real(item[6]);
  out.z_loss = real(item[7]);
  return true;
}

}  // namespace

// Tuples become structures here: what pybind11 has for nested tuples takes longer than the kernel of a small loss.
namespace pybind11::detail {

template <class T>
struct structure_caster {
  PYBIND11_TYPE_CASTER(T, const_name("tuple"));
  bool load(handle source, bool) { return read(source, value); }
};

template <>
struct type_caster<Tensor> : structure_caster<Tensor> {};
template <>
struct type_caster<Targets> : structure_caster<Targets> {};
template <>
struct type_caster<Transform> : structure_caster<Transform> {};
template <>
struct type_caster<Upstream> : structure_caster<Upstream> {};
template <>
struct type_caster<CrossEntropyCall> : structure_caster<CrossEntropyCall> {};

}  // namespace pybind11::detail
