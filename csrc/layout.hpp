// SPDX-License-Identifier: Apache-2.0
// How the rows of tensors lie in memory.
#pragma once

#include <utility>
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

// The axes of the rows of several tensors at once, those that lie behind each other in all of them merged into one.
class RowLayout {
 public:
  explicit RowLayout(std::vector<const Tensor*> tensors) : tensors_(std::move(tensors)) {
    const Tensor& first = *tensors_.front();
    for (size_t d = 0; d < first.shape.size(); ++d) {
      if (static_cast<int>(d) == first.axis || first.shape[d] == 1) continue;
      std::vector<int64_t> strides;
      for (const Tensor* tensor : tensors_) strides.push_back(tensor->strides[d]);
      if (!extents_.empty() && merges(strides, first.shape[d])) {
        extents_.back() *= first.shape[d];
        strides_.back() = strides;
      } else {
        extents_.push_back(first.shape[d]);
        strides_.push_back(strides);
      }
    }
    if (extents_.empty()) {
      extents_.push_back(1);
      strides_.emplace_back(tensors_.size(), 0);
    }
  }

  int64_t inner() const { return extents_.back(); }
  const std::vector<int64_t>& extents() const { return extents_; }
  int64_t stride(size_t axis, size_t tensor) const { return strides_[axis][tensor]; }

  Tile tile(size_t tensor, int64_t row) const {
    const Tensor& t = *tensors_[tensor];
    int64_t offset = 0;
    for (size_t d = extents_.size(); d-- > 0;) {
      offset += row % extents_[d] * strides_[d][tensor];
      row /= extents_[d];
    }
    return {t.data + offset * itemsize_of(t.dtype), t.dtype, strides_.back()[tensor], t.strides[t.axis]};
  }

 private:
  bool merges(const std::vector<int64_t>& strides, int64_t extent) const {
    for (size_t i = 0; i < strides.size(); ++i) {
      if (strides_.back()[i] != strides[i] * extent) return false;
    }
    return true;
  }

  std::vector<const Tensor*> tensors_;
  std::vector<int64_t> extents_;
  std::vector<std::vector<int64_t>> strides_;  // [axis][tensor]
};

}  // namespace fastloss
