// SPDX-License-Identifier: Apache-2.0
#include "linear.hpp"

#include <string.h>

#include <algorithm>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastloss {
namespace {

constexpr int64_t kTaskElements = 64 * 1024;
constexpr int64_t kStreamBytes = int64_t{1} << 25;

}  // namespace

void multiply(const SparseRows& sparse, const Tensor& matrix, const Tensor& out) {
  const int64_t width = matrix.shape[1];
  const size_t itemsize = itemsize_of(matrix.dtype);
  const size_t value_size = matrix.dtype == kF64 ? sizeof(double) : sizeof(float);
  const Tile tile{matrix.data, matrix.dtype, matrix.strides[0], 1};
  const bool stream = sparse.rows * width * static_cast<int64_t>(itemsize) >= kStreamBytes;
  const RowKernels& table = matrix.dtype == kF64 ? kernels().f64 : kernels().f32;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  const int threads = sparse.start[sparse.rows] * width < kTaskElements ? 1 : get_num_threads();
  parallel_for((sparse.rows + grain - 1) / grain, threads, [&](int64_t task) {
    for (int64_t row = task * grain; row < std::min(sparse.rows, (task + 1) * grain); ++row) {
      const int64_t begin = sparse.start[row];
      const Tile to{out.data + row * out.strides[0] * itemsize, out.dtype, 0, 1};
      table.weighted_rows(tile, width, sparse.ids + begin, static_cast<const char*>(sparse.values) + begin * value_size,
                          sparse.start[row + 1] - begin, to, stream);
    }
  });
}

void transpose(const SparseRows& sparse, Dtype values, const SparseRows& out) {
  const int64_t entries = sparse.start[sparse.rows];
  std::fill(out.start, out.start + out.rows + 1, 0);
  for (int64_t k = 0; k < entries; ++k) ++out.start[sparse.ids[k] + 1];
  for (int64_t row = 0; row < out.rows; ++row) out.start[row + 1] += out.start[row];
  std::vector<int64_t> next(out.start, out.start + out.rows);
  const size_t size = values == kF64 ? sizeof(double) : sizeof(float);
  for (int64_t row = 0; row < sparse.rows; ++row) {
    for (int64_t k = sparse.start[row]; k < sparse.start[row + 1]; ++k) {
      const int64_t at = next[sparse.ids[k]]++;
      out.ids[at] = static_cast<int32_t>(row);
      memcpy(static_cast<char*>(out.values) + at * size, static_cast<const char*>(sparse.values) + k * size, size);
    }
  }
}

namespace {

constexpr int64_t kBlockClasses = 128;  // classes of one block
constexpr int64_t kPieceTokens = 2048;  // tokens of one product: their factor of a block stays in L2
constexpr int64_t kPanelFeatures = 64;  // features of one product: what a block of registers holds

// How many tokens lie side by side in a packed factor: a dot product of bfloat16 takes them in pairs.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;

// Panels of features, each [tokens / kTogether][feature][kTogether].
template <class T>
std::vector<T> packed_panels(const Tensor& rows) {
  constexpr int64_t kStep = kTogether<T>;
  const int64_t tokens = rows.shape[0], features = rows.shape[1];
  const int64_t groups = (tokens + kStep - 1) / kStep;
  std::vector<T> out(groups * kStep * features);
  for (int64_t first = 0; first < features; first += kPanelFeatures) {
    const int64_t width = std::min(kPanelFeatures, features - first);
    T* panel = out.data() + first * groups * kStep;
    for (int64_t token = 0; token < tokens; ++token) {
      const T* from = reinterpret_cast<const T*>(rows.data) + token * rows.strides[0] + first;
      T* to = panel + token / kStep * width * kStep + token % kStep;
      for (int64_t i = 0; i < width; ++i) to[kStep * i] = from[i];
    }
  }
  return out;
}

// `classes` columns become rows of `out`, `out_step` apart; squares keep both sides in the cache.
template <class T>
void transpose_block(const T* rows, int64_t tokens, int64_t step, int64_t classes, int64_t out_step, T* out) {
  constexpr int64_t kSide = 16;
  for (int64_t t = 0; t < tokens; t += kSide) {
    for (int64_t c = 0; c < classes; c += kSide) {
      const int64_t token_end = std::min(tokens, t + kSide), class_end = std::min(classes, c + kSide);
      for (int64_t i = c; i < class_end; ++i) {
        for (int64_t token = t; token < token_end; ++token) out[i * out_step + token] = rows[token * step + i];
      }
    }
  }
}

template <class T>
void product_of(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add, const Tensor& rounded) {
  const int64_t tokens = grad.shape[0], classes = grad.shape[1], features = hidden.shape[1];
  const int64_t whole = (tokens + kTogether<T> - 1) / kTogether<T> * kTogether<T>;
  const std::vector<T> panels = packed_panels<T>(hidden);
  const bool stream = rounded && classes * features * itemsize_of(rounded.dtype) >= kStreamBytes;
  parallel_for((classes + kBlockClasses - 1) / kBlockClasses, get_num_threads(), [&](int64_t block) {
    thread_local std::vector<T> factor;
    thread_local std::vector<float> own;  // sums, where there is no total
    const int64_t first = block * kBlockClasses;
    const int64_t count = std::min(kBlockClasses, classes - first);
    const bool one_piece = whole <= kPieceTokens;
    if (!total) own.resize(kBlockClasses * (one_piece ? kPanelFeatures : features));
    for (int64_t begin = 0; begin < whole; begin += kPieceTokens) {
      const int64_t length = std::min(kPieceTokens, whole - begin);
      const bool last = begin + length == whole;
      factor.assign(kBlockClasses * length, T(0));
      transpose_block(reinterpret_cast<const T*>(grad.data) + begin * grad.strides[0] + first, std::min(length, tokens - begin),
                      grad.strides[0], count, length, factor.data());
      for (int64_t feature = 0; feature < features; feature += kPanelFeatures) {
        const int64_t width = std::min(kPanelFeatures, features - feature);
        float* const sums = total       ? total + first * features + feature
                            : one_piece ? own.data()
                                        : own.data() + feature * kBlockClasses;
        const int64_t step = total ? features : width;
        product.multiply(count, width, length, length, width, step, add || begin > 0, factor.data(),
                         panels.data() + feature * whole + begin * width, sums, kTogether<T> > 1);
        if (!rounded || !last) continue;
        const Tile to{rounded.data + (first * features + feature) * itemsize_of(rounded.dtype), rounded.dtype, features, 1};
        kernels().f32.round(sums, step, count, static_cast<int>(width), to, stream);
      }
    }
    product.release(kTogether<T> > 1);
  });
}

}  // namespace

void transposed_product(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add,
                        const Tensor& rounded) {
  if (grad.dtype == kBF16) {
    product_of<uint16_t>(product, grad, hidden, total, add, rounded);
  } else {
    product_of<float>(product, grad, hidden, total, add, rounded);
  }
}

}  // namespace fastloss
