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

// `one_hot` is what goes with the target.
template <class V>
__device__ inline typename V::T target_gradient(const Problem& p, const GradientRow& c, int64_t id, const Transformed<V>& logit,
                                                double one_hot) {
  using A = typename V::T;
  const double weight = per_class<A>(p.weight, id, A(1));
  const double slope = p.transform.softcap != 0.0 ? static_cast<double>(logit.derivative) : p.transform.inv_temperature;
  return static_cast<A>(
      TargetGradients<CudaF64>::gradient(logit.z, c.max, c.rest, c.a, c.b, c.c, weight * c.d, slope, one_hot));
}

template <class T, class V>
__device__ inline typename V::T target_gradient(const Problem& p, const GradientRow& c, int64_t row, const UpstreamsOfRow& g,
                                                int i) {
  const IdsOfRow ids{p.ids, row};
  const Transformed<V> logit = logit_at<T, V>(p, row_of<const T>(p, p.logits, row), ids[i]);
  return target_gradient<V>(p, c, ids[i], logit, one_hot(ids, g, p.ids.k, i));
}

// Logits of a run become its gradient, but for the targets.
template <class V, bool kFull>
class RunGradient {
 public:
  using A = typename V::T;

  __device__ RunGradient(const Problem& p, const GradientRow& c, int64_t row) : RunGradient(p, c, terms_of(p, c), row) {}
  // With terms that another thread has made.
  __device__ RunGradient(const Problem& p, const GradientRow& c, const GradientTerms<Along<V>>& terms, int64_t row)
      : p_(p), c_(c), row_(row), terms_(terms) {}

  __device__ static GradientTerms<Along<V>> terms_of(const Problem& p, const GradientRow& c) {
    GradientTerms<Along<V>> terms;
    terms.weight = terms.soft = terms.derivative = nullptr;
    if constexpr (kFull) {
      set_row(terms, 0, c, p.transform.softcap != 0.0 ? 1.0 : p.transform.inv_temperature);
    } else {
      terms.ref[0] = finite_reference(static_cast<A>(c.max));
      terms.inv_sum[0] = static_cast<A>(1.0 / (1.0 + c.rest));
      terms.a[0] = static_cast<A>(c.a);
      terms.d[0] = static_cast<A>(c.d);
    }
    return terms;
  }

  template <class R, int kSize>
  __device__ void apply(const R& run, A (&z)[kSize]) {
    [[maybe_unused]] A derivative[kSize], w[kSize], q[kSize];
    if constexpr (kFull) {  // ones and zeros, not null pointers: an array that may be missing would not stay in registers
      transform_run<V>(p_, run, z, derivative);
      load_per_class(c_.d != 0.0 || p_.soft.data ? static_cast<const A*>(p_.weight) : nullptr, run, w);
      load_any(p_, p_.soft, row_, run, q);
      terms_.weight = w;
      terms_.soft = q;
      terms_.derivative = derivative;
    }
    const GradientFormula<Along<V>, !kFull> formula{terms_};
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = kFull ? formula.at(z, i) : formula.of_power(exp_of<V>(z[i] - formula.ref));
  }

 private:
  const Problem& p_;
  const GradientRow& c_;
  const int64_t row_;
  GradientTerms<Along<V>> terms_;
};

// Of an ignored row, whatever its logits are.
template <class T, class V, bool kAdjacent>
__device__ inline void write_zeros(const Problem& p, const Place& at) {
  T* out = row_of<T>(p, p.grad, at.row);
  walk<T, kAdjacent>(p, at, row_of<const T>(p, p.logits, at.row), [&](const auto& run) {
    const typename V::T zeros[std::decay_t<decltype(run)>::kSize] = {};
    store(zeros, run, p.grad.class_step, out);
  });
}

// Everything but the targets. `out` may be the row itself.
template <class T, class V, bool kAdjacent, bool kFull>
__device__ inline void write_gradient(const Problem& p, const Place& at, const GradientRow& c, const Ring& ring) {
  using A = typename V::T;
  const T* row = row_of<const T>(p, p.logits, at.row);
  T* out = row_of<T>(p, p.grad, at.row);
  if (c.zero) {
    write_zeros<T, V, kAdjacent>(p, at);
    return;
  }
  RunGradient<V, kFull> gradient(p, c, at.row);
  walk_logits<T, V, kAdjacent>(p, at, row, A(0), ring, [&](const auto& run, auto& z) {
    gradient.apply(run, z);
    store(z, run, p.grad.class_step, out);
  });
}

}  // namespace
}  // namespace fastloss
