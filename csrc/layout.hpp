// SPDX-License-Identifier: Apache-2.0
// How the rows of tensors lie in memory.
#pragma once

#include <vector>

#include "engine.hpp"

namespace fastloss {

inline int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (size_t d = 0; d < tensor.shape.size(); ++d) {
    if (static_cast<int>(d) != tensor.axis) rows *= tensor.shape[d];
  }
  return rows;
}

// The axes of the rows of the tensors of a call, those that lie behind each other in all of them merged into one.
class RowLayout {
 public:
  enum Part { kLogits, kSoft, kGrad, kParts };
  struct Axis {
    int64_t extent = 1;
    int64_t stride[kParts] = {};
  };

  // `soft` and `grad` may be empty.
  RowLayout(const Tensor& logits, const Tensor& soft, const Tensor& grad)
      : tensors_{&logits, soft ? &soft : nullptr, grad ? &grad : nullptr} {
    axes_.reserve(logits.shape.size());
    for (size_t d = 0; d < logits.shape.size(); ++d) {
      if (static_cast<int>(d) == logits.axis || logits.shape[d] == 1) continue;
      Axis axis{logits.shape[d], {}};
      for (int part = 0; part < kParts; ++part) axis.stride[part] = tensors_[part] ? tensors_[part]->strides[d] : 0;
      if (!axes_.empty() && lies_inside(axis)) {
        axis.extent *= axes_.back().extent;
        axes_.back() = axis;
      } else {
        axes_.push_back(axis);
      }
    }
    if (axes_.empty()) axes_.emplace_back();
  }

  const std::vector<Axis>& axes() const { return axes_; }
  int64_t inner() const { return axes_.back().extent; }

  // From this row on; empty for a tensor that is.
  Tile tile(Part part, int64_t row) const {
    if (!tensors_[part]) return {};
    const Tensor& t = *tensors_[part];
    int64_t offset = 0;
    for (size_t d = axes_.size(); d-- > 1; row /= axes_[d].extent) offset += row % axes_[d].extent * axes_[d].stride[part];
    offset += row * axes_[0].stride[part];
    return {t.data + offset * itemsize_of(t.dtype), t.dtype, axes_.back().stride[part], t.strides[t.axis]};
  }

 private:
  // One step along the last axis so far is as long as all of this one.
  bool lies_inside(const Axis& axis) const {
    for (int part = 0; part < kParts; ++part) {
      if (axes_.back().stride[part] != axis.stride[part] * axis.extent) return false;
    }
    return true;
  }

  const Tensor* tensors_[kParts];
  std::vector<Axis> axes_;
};

}  // namespace fastloss
