// SPDX-License-Identifier: Apache-2.0
// From one call to many tiles: lays rows out, shares them among threads, and applies the formula of the loss to each row.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

#include "kernels.hpp"

namespace fastloss {

// A dense strided tensor with one axis of classes. Strides are in elements.
struct Tensor {
  char* data = nullptr;
  Dtype dtype = kF32;
  std::vector<int64_t> shape, strides;
  int axis = 0;
  explicit operator bool() const { return data != nullptr; }
};

// Target ids, k of them a row, side by side in row order; 4 or 8 bytes each, signed.
struct Targets {
  const void* data = nullptr;
  int itemsize = 8;
  int k = 1;
  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int64_t i) const {
    return itemsize == 8 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// What sampling kept of the gradient of each row (sampled.hpp). The threshold is relative to the factor of the row's
// probabilities, and `token` numbers the rows for their random numbers.
struct SampledGradient {
  uint64_t seed = 0;
  double threshold = 0.0;
  const int64_t* token = nullptr;
  std::vector<std::vector<Kept<double>>> rows;
};

// Neighbouring rows of a call.
struct Rows {
  int64_t first = 0;
  int count = 0;
  const char* ignored = nullptr;  // not 0: this row's logits are not looked at
  Partials partials = {};         // of the scan
  int64_t blocks = 0;

  void copy_block_max(int r, double* to) const {
    for (int64_t block = 0; block < blocks; ++block) to[block] = partials.row(block, kMax)[r];
  }
};

// One call over all rows: statistics if `on_rows` is given, then the gradient if `coefficients` is. Each row is seen once by
// each.
struct Sweep {
  Pass pass;
  Tensor logits, soft, grad;
  Targets targets;
  bool want_rank = false;
  SampledGradient* sampled = nullptr;     // in place of a dense gradient
  const int64_t* ignore_index = nullptr;  // rows with this target are ignored
  // One entry a row, or a target of a row. Those of ignored rows hold nothing.
  std::function<void(const Rows& rows, const RowStats* stats, const double* target_z, const int64_t* rank)> on_rows;
  // Fills in `coefficients`, one entry a row, and `g`, one number a target; those of ignored rows do not matter.
  std::function<void(const Rows& rows, GradientRow* coefficients, double* g)> coefficients;
  void run();
};

// Numbers that a forward keeps of each row: SavedRow, and the maxima of the blocks.
inline int64_t saved_width(int64_t classes) { return kSavedFields + (classes + kBlock - 1) / kBlock; }

// Those of all rows, side by side, as a backward reads them.
class SavedRows {
 public:
  SavedRows(const double* data, int64_t classes) : data_(data), width_(saved_width(classes)) {}
  const SavedRow& operator[](int64_t row) const { return *reinterpret_cast<const SavedRow*>(data_ + row * width_); }
  const double* block_max(int64_t row) const { return data_ + row * width_ + kSavedFields; }

 private:
  const double* data_;
  int64_t width_;
};

inline int64_t itemsize_of(Dtype dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

// Writes scale_i w_j (L_i - z_ij) for all rows; `row_scale` gives the scale of a row, and fills in max and rest.
void write_soft_gradient(const Pass& pass, const Tensor& logits, const Tensor& out,
                         const std::function<double(int64_t row, RowStats& stats)>& row_scale);

// Throws std::out_of_range for the first target outside [0, classes) that is not `ignore_index`. The rows have the shape of
// these axes without `axis`, which is none for -1.
void check_targets(const Targets& targets, const std::vector<int64_t>& axes, int axis, int64_t classes,
                   const int64_t* ignore_index);

}  // namespace fastloss
