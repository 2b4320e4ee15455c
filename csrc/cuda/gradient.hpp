// SPDX-License-Identifier: Apache-2.0
// The gradient of a row: every thread writes what it takes of the row, then the targets are written again, exactly.
#pragma once

#include "../gradient.hpp"
#include "rows.hpp"

namespace fastloss {
namespace {

// The ids of a row as one_hot takes them: side by side, 8 bytes each.
struct IdsOfRow {
  DeviceIds ids;
  int64_t row;
  __device__ int64_t operator[](int i) const { return id_at(ids, row * ids.k + i); }
};

// What goes with the targets of a row: numbers in memory, or one for a lone target.
struct UpstreamsOfRow {
  const double* memory;
  double lone;
  __device__ double operator[](int i) const { return memory ? memory[i] : lone; }
};

template <class T, class V>
__device__ inline typename V::T target_gradient(const Problem& p, const GradientRow& c, int64_t row, const UpstreamsOfRow& g,
                                                int i) {
  using A = typename V::T;
  const IdsOfRow ids{p.ids, row};
  const Transformed<V> at = logit_at<T, V>(p, row_of<const T>(p, p.logits, row), ids[i]);
  const double weight = per_class<A>(p.weight, ids[i], A(1));
  const double slope = p.transform.softcap != 0.0 ? static_cast<double>(at.derivative) : p.transform.inv_temperature;
  return static_cast<A>(
      TargetGradients<CudaF64>::gradient(at.z, c.max, c.rest, c.a, c.b, c.c, weight * c.d, slope, one_hot(ids, g, p.ids.k, i)));
}

// Everything but the targets. `out` may be the row itself.
template <class T, class V, bool kAdjacent, bool kFull>
__device__ inline void write_gradient(const Problem& p, const Place& at, const GradientRow& c) {
  using A = typename V::T;
  const bool softcapped = p.transform.softcap != 0.0;
  const T* row = row_of<const T>(p, p.logits, at.row);
  T* out = row_of<T>(p, p.grad, at.row);
  GradientTerms<Along<V>> terms;
  terms.weight = terms.soft = terms.derivative = nullptr;
  set_row(terms, 0, c, softcapped ? 1.0 : p.transform.inv_temperature);
  walk_logits<T, V, kAdjacent, kFull>(p, at, row, A(0), [&](const auto& run, auto& z) {
    constexpr int kSize = sizeof(z) / sizeof(A);
    [[maybe_unused]] A derivative[kSize], w[kSize], q[kSize];
    if constexpr (kFull) {  // ones and zeros, not null pointers: an array that may be missing would not stay in registers
      transform_run<V>(p, run, z, derivative);
      load_per_class(c.d != 0.0 || p.soft.data ? static_cast<const A*>(p.weight) : nullptr, run, w);
      load_any(p, p.soft, at.row, run, q);
      terms.weight = w;
      terms.soft = q;
      terms.derivative = derivative;
    }
    const GradientFormula<Along<V>, !kFull> formula{terms};
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = c.zero ? A(0) : formula.at(z, i);
    store(z, run, p.grad.class_step, out);
  });
}

}  // namespace
}  // namespace fastloss
