// SPDX-License-Identifier: Apache-2.0
#include "cross_entropy.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "layout.hpp"
#include "numerics.hpp"

namespace fastloss {
namespace {

double number(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case kF64:
      return static_cast<const double*>(data)[i];
    case kF16:
      return widen(static_cast<const F16*>(data)[i]);
    case kBF16:
      return widen(static_cast<const BF16*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

Dtype accumulation(Dtype dtype) { return dtype == kF64 ? kF64 : kF32; }

void write_number(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == kF64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// The parts of a call that forward and backward share.
class Call {
 public:
  explicit Call(const CrossEntropyCall& call)
      : c_(call),
        classes_(call.logits.shape[call.logits.axis]),
        soft_(call.soft_target),
        options_{call.label_smoothing, call.z_loss} {}

  bool ignored(int64_t row) const { return !soft_ && c_.target[row] == c_.ignore_index; }

  double row_weight(int64_t row) const {
    return soft_ || !c_.weight ? 1.0 : number(c_.weight, accumulation(c_.logits.dtype), c_.target[row]);
  }

  // The rows that count, by weight: what the mean is divided by.
  double counted(int64_t rows) const {
    if (soft_) return static_cast<double>(rows);
    double sum = 0.0;
    int64_t count = 0;  // without weights: exact, and no chain of additions
    for (int64_t row = 0; row < rows; ++row) {
      if (!c_.weight) {
        count += !ignored(row);
      } else if (!ignored(row)) {
        sum += row_weight(row);
      }
    }
    return c_.weight ? sum : static_cast<double>(count);
  }

  double row_loss(int64_t row, const RowStats& stats, double target_z, SavedRow* saved) const {
    if (soft_) return cross_entropy_of_soft_target(options_, classes_, stats, saved);
    return cross_entropy_of_id(options_, classes_, stats, target_z, row_weight(row), saved);
  }

  // `g` has one number a row, but with soft targets none.
  void row_gradient(const Rows& rows, int r, const SavedRows& saved, double upstream, GradientRow* out, double* g) const {
    if (rows.ignored[r]) return;
    const int64_t row = rows.first + r;
    // Made in its place: a copy of numbers that were just written would wait for them.
    new (&out[r]) GradientRow(cross_entropy_gradient(options_, classes_, saved[row], row_weight(row), soft_, upstream));
    out[r].block_max = saved.block_max(row);
    if (!soft_) g[r] = upstream * row_weight(row) * (1.0 - options_.label_smoothing);
  }

  Sweep sweep(const Tensor& grad) const {
    Sweep sweep;
    sweep.pass.classes = classes_;
    sweep.pass.transform = c_.transform;
    sweep.pass.weight = c_.label_smoothing != 0.0 || soft_ ? c_.weight : nullptr;
    sweep.pass.want = c_.label_smoothing != 0.0 ? kWantWeighted : 0;
    sweep.logits = c_.logits;
    sweep.soft = c_.soft_target;
    sweep.grad = grad;
    sweep.targets = c_.target;
    if (!soft_) sweep.ignore_index = &c_.ignore_index;
    return sweep;
  }

 private:
  const CrossEntropyCall& c_;
  const int64_t classes_;
  const bool soft_;
  const CrossEntropyOptions options_;
};

// In a fixed order, whatever the threads did.
double ordered_sum(const double* values, int64_t count) {
  constexpr int64_t kChains = 8;
  double chain[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t k = 0; k < kChains; ++k) chain[k] += values[i + k];
  }
  for (; i < count; ++i) chain[i % kChains] += values[i];
  double sum = 0.0;
  for (const double part : chain) sum += part;
  return sum;
}

}  // namespace

double cross_entropy(const CrossEntropyCall& c, Reduction reduction, const double* denominator, void* loss, double* saved,
                     const Tensor& grad, double upstream, SampledGradient* sampled) {
  const Call call(c);
  const int64_t rows = row_count(c.logits);
  if (c.target) check_targets(c.target, c.logits.shape, c.logits.axis, c.logits.shape[c.logits.axis], &c.ignore_index);
  const double divisor = denominator ? *denominator : reduction == Reduction::kMean ? call.counted(rows) : 1.0;
  const double factor = (divisor != 0.0 ? 1.0 / divisor : 0.0) * upstream;  // nothing counted: no row has a gradient
  const Dtype dtype = accumulation(c.logits.dtype);

  // Not cleared: their pages are touched first by the threads that fill them.
  const std::unique_ptr<double[]> losses(new double[reduction == Reduction::kNone ? 0 : rows]);
  const int64_t width = saved_width(c.logits.shape[c.logits.axis]);
  const std::unique_ptr<double[]> kept(new double[saved ? 0 : width * rows]);
  double* numbers = saved ? saved : kept.get();
  const SavedRows rows_saved(numbers, c.logits.shape[c.logits.axis]);
  Sweep sweep = call.sweep(grad);
  sweep.on_rows = [&](const Rows& rows, const RowStats* stats, const double* target_z, const int64_t*) {
    for (int r = 0; r < rows.count; ++r) {
      const int64_t row = rows.first + r;
      double* of_row = numbers + row * width;
      double row_loss = 0.0;
      if (rows.ignored[r]) {
        std::fill_n(of_row, width, 0.0);
      } else {
        row_loss = call.row_loss(row, stats[r], c.target ? target_z[r] : 0.0, reinterpret_cast<SavedRow*>(of_row));
        rows.copy_block_max(r, of_row + kSavedFields);
      }
      if (reduction == Reduction::kNone) {
        write_number(loss, dtype, row, row_loss);
      } else {
        losses[row] = row_loss;
      }
    }
  };
  if (sampled) {
    sweep.sampled = sampled;
    sampled->rows.resize(rows);
  }
  if (grad || sampled) {
    sweep.coefficients = [&](const Rows& rows, GradientRow* out, double* g) {
      for (int r = 0; r < rows.count; ++r) call.row_gradient(rows, r, rows_saved, factor, out, g);
    };
  }
  sweep.run();
  if (reduction == Reduction::kSum) write_number(loss, dtype, 0, ordered_sum(losses.get(), rows));
  if (reduction == Reduction::kMean) {
    const bool empty = divisor == 0.0 && !denominator;
    write_number(loss, dtype, 0, empty ? std::numeric_limits<double>::quiet_NaN() : ordered_sum(losses.get(), rows) / divisor);
  }
  return divisor;
}

void cross_entropy_backward(const CrossEntropyCall& c, double scale, const double* saved, const Upstream& upstream,
                            const Tensor& grad) {
  const Call call(c);
  const SavedRows rows_saved(saved, c.logits.shape[c.logits.axis]);
  Sweep sweep = call.sweep(grad);
  sweep.coefficients = [&](const Rows& rows, GradientRow* out, double* g) {
    for (int r = 0; r < rows.count; ++r) {
      const double u = scale * number(upstream.data, upstream.dtype, (rows.first + r) * upstream.step);
      call.row_gradient(rows, r, rows_saved, u, out, g);
    }
  };
  sweep.run();
}

void soft_target_gradient(const CrossEntropyCall& c, double scale, const double* saved, const Upstream& upstream,
                          const Tensor& out) {
  Pass pass;
  pass.classes = c.logits.shape[c.logits.axis];
  pass.transform = c.transform;
  pass.weight = c.weight;
  const SavedRows rows_saved(saved, c.logits.shape[c.logits.axis]);
  write_soft_gradient(pass, c.logits, out, [&](int64_t row, RowStats& stats) {
    stats.max = rows_saved[row].max;
    stats.rest = rows_saved[row].rest;
    return scale * (1.0 - c.label_smoothing) * number(upstream.data, upstream.dtype, row * upstream.step);
  });
}

}  // namespace fastloss
