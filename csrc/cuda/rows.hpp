// SPDX-License-Identifier: Apache-2.0
// What is worked out once a row: its loss or its statistics from the sums, and the coefficients of its gradient.
#pragma once

#include "statistics.hpp"

namespace fastloss {
namespace {

template <class A>
__device__ inline void write(void* out, int64_t i, double value) {
  if (out) static_cast<A*>(out)[i] = static_cast<A>(value);
}

template <class A>
__device__ inline A per_class(const void* values, int64_t column, A missing) {
  return values ? static_cast<const A*>(values)[column] : missing;
}

// z and dz/dx of a logit.
template <class V>
__device__ inline Transformed<V> transformed(const Problem& p, typename V::T x, int64_t column) {
  using A = typename V::T;
  if (is_identity(p.transform)) return {x, A(1)};
  return transform<V>(p.transform, x, per_class<A>(p.transform.bias, column, A(0)));
}

template <class T, class V>
__device__ inline Transformed<V> logit_at(const Problem& p, const T* row, int64_t column) {
  return transformed<V>(p, number(row[column * p.logits.class_step]), column);
}

// The target of a row of a cross-entropy. An id out of range is never used as a place: its row gets NaN.
template <class A>
struct Label {
  int id = -1;  // none, or out of range
  bool ignored = false, valid = true;
  A weight = 1;  // w_y
};

template <class A>
__device__ inline Label<A> label_of_id(const Problem& p, const Loss& loss, int64_t id) {
  if (!p.ids.data) return {};
  const bool valid = id >= 0 && id < p.classes;
  return {valid ? static_cast<int>(id) : -1, id == loss.ignore_index, valid,
          valid ? per_class<A>(loss.class_weight, id, A(1)) : A(1)};
}

template <class A>
__device__ inline Label<A> label_of(const Problem& p, const Loss& loss, int64_t row) {
  return label_of_id<A>(p, loss, p.ids.data ? id_at(p.ids, row) : 0);
}

template <class A>
__device__ inline bool has_logit(const Label<A>& label) {
  return label.id >= 0 && !label.ignored;
}

// And its logit z with dz/dx, as far as there is one.
template <class V>
struct Target {
  Label<typename V::T> label;
  Transformed<V> logit;
};

template <class T, class V>
__device__ inline Target<V> target_of(const Problem& p, const Loss& loss, int64_t row) {
  Target<V> target = {label_of<typename V::T>(p, loss, row), {}};
  if (has_logit(target.label)) target.logit = logit_at<T, V>(p, row_of<const T>(p, p.logits, row), target.label.id);
  return target;
}

// `stats` counts only where the row is not ignored.
template <class V>
__device__ inline double loss_of_row(const Problem& p, const Loss& loss, const Target<V>& target, const RowStats& stats,
                                     SavedRow& saved) {
  const CrossEntropyOptions options{loss.label_smoothing, loss.z_loss};
  saved = {0.0, 0.0, 0.0};
  if (!p.ids.data) return cross_entropy_of_soft_target(options, p.classes, stats, &saved);
  if (target.label.ignored) return 0.0;
  if (target.label.valid) return cross_entropy_of_id(options, p.classes, stats, target.logit.z, target.label.weight, &saved);
  const double nan = __builtin_nan("");
  saved = {nan, nan, nan};
  return nan;
}

// One thread a row calls this.
template <class A>
__device__ inline void write_loss(const Loss& loss, int64_t row, double value, const SavedRow& saved) {
  if (loss.wide) {
    write<double>(loss.losses, row, value);
  } else {
    write<A>(loss.losses, row, value);
  }
  if (loss.saved) loss.saved[row] = saved;
}

// The lanes that share the row call this together: they share its targets.
template <class T, class V>
__device__ inline void finish_statistics(const Problem& p, const Statistics& out, int64_t row, const RowStats& s, int lane,
                                         int lanes) {
  using A = typename V::T;
  const bool valid = s.rest == s.rest;
  for (int i = lane; out.logprob && i < p.ids.k; i += lanes) {
    const int64_t id = id_at(p.ids, row * p.ids.k + i);
    const bool there = id >= 0 && id < p.classes;
    const double z = there ? logit_at<T, V>(p, row_of<const T>(p, p.logits, row), id).z : __builtin_nan("");
    write<A>(out.logprob, row * p.ids.k + i, (z - s.max) - s.log_sum);
  }
  if (lane != 0) return;
  write<A>(out.logsumexp, row, s.max + s.log_sum);
  write<A>(out.entropy, row, s.log_sum - s.mean_x);
  write<A>(out.mean_logit, row, valid ? s.max + s.weighted / static_cast<double>(p.classes) : s.rest);
  write<A>(out.sum_sq_prob, row, valid ? s.sum_sq : s.rest);
  write<A>(out.max_prob, row, 1.0 / (1.0 + s.rest));
  if (out.argmax) out.argmax[row] = s.argmax;
  if (out.saved) out.saved[row] = {s.max, s.rest, 0.0};
}

__device__ inline double upstream_of(const GradientSource& source, int64_t row) {
  const DeviceUpstream& up = source.upstream;
  return (source.scale ? *source.scale : 1.0) * (up.data ? element(up.data, up.dtype, row * up.step) : 1.0);
}

__device__ inline bool same_bits(double a, double b) {
  int64_t bits[2];
  __builtin_memcpy(&bits[0], &a, sizeof a);
  __builtin_memcpy(&bits[1], &b, sizeof b);
  return bits[0] == bits[1];
}

// Whether the gradient is there already: the same for all threads, since nobody writes what they read. One of them notes what
// came; 0 and what is not finite are no guide to the next. Another stream may do so at the same time: a wrong expectation costs
// time alone.
__device__ inline bool made_by_forward(const GradientSource& source) {
  const Expected& expected = source.expected;
  if (!expected.next) return false;
  const double came = element(source.upstream.data, source.upstream.dtype, 0);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    *expected.surprised = !same_bits(came, *expected.next);
    if (came - came == 0.0 && came != 0.0) *expected.next = came;
  }
  return expected.made_for && same_bits(came, *expected.made_for);
}

// Of a loss times u.
template <class A>
__device__ inline GradientRow coefficients_of_loss(const Problem& p, const Loss& loss, const Label<A>& label,
                                                   const SavedRow& saved, double u) {
  GradientRow out;
  out.zero = p.ids.data && label.ignored;
  if (out.zero) return out;
  return cross_entropy_gradient({loss.label_smoothing, loss.z_loss}, p.classes, saved, label.weight, !p.ids.data, u);
}

// And what goes with its target alone.
template <class A>
__device__ inline double one_hot_of_loss(const Loss& loss, const Label<A>& label, double u) {
  return u * label.weight * (1.0 - loss.label_smoothing);
}

// Both of a loss; or coefficients that lie in memory, where g stay.
template <class A>
__device__ inline GradientRow coefficients_of(const Problem& p, const Loss& loss, const GradientSource& source,
                                              const SavedRow* saved, int64_t row, double& g) {
  const SavedRow kept = saved[row];
  if (loss.wanted) {
    const Label<A> label = label_of<A>(p, loss, row);
    const double u = upstream_of(source, row);
    g = one_hot_of_loss(loss, label, u);
    return coefficients_of_loss(p, loss, label, kept, u);
  }
  GradientRow out;
  const double* c = source.coefficients + 4 * row;
  out.max = kept.max;
  out.rest = kept.rest;
  out.a = c[0];
  out.b = c[1];
  out.c = c[2];
  out.d = c[3];
  for (int i = 0; i < p.ids.k; ++i) {
    const int64_t id = id_at(p.ids, row * p.ids.k + i);
    if (id < 0 || id >= p.classes) out.a = __builtin_nan("");
  }
  return out;
}

}  // namespace
}  // namespace fastloss
