// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"

#include <algorithm>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "room.hpp"
#include "sizes.hpp"
#include "transpose.hpp"

namespace fastloss {
namespace {

constexpr int64_t kPanel = 64;         // columns of one product: what a block of registers holds
constexpr int64_t kUnit = 16;          // tokens at once, mostly
constexpr int64_t kPageFloats = 1024;  // rows so far apart, or a multiple of it, drive each other out of the cache

// ---- left times right ------------------------------------------------------------------------------------------------

// How much of a product is made at once: of `depth` rows of the right factor a panel of `width` columns, which stays in the
// cache, times `height` rows of the left one after the other.
struct Blocks {
  int64_t height, width, depth;
};

struct Panel {
  const float* data;
  int64_t step;
};

// The right factor, in any strides.
struct Right {
  const float* data;
  int64_t columns, row_step, column_step;

  // Rows `first_row` and up of some columns, which lie side by side: where they are, or packed into `room`.
  Panel panel(int64_t first_row, int64_t depth, int64_t first_column, int64_t width, Room<float>& room) const {
    const float* from = data + first_row * row_step + first_column * column_step;
    if (column_step == 1 && row_step >= columns && row_step % kPageFloats != 0) return {from, row_step};
    float* const packed = room.of(depth * width);
    if (column_step == 1) {
      for (int64_t r = 0; r < depth; ++r) std::copy_n(from + r * row_step, width, packed + r * width);
    } else if (row_step == 1) {
      transpose_block(from, width, column_step, depth, width, packed);
    } else {
      for (int64_t r = 0; r < depth; ++r) {
        for (int64_t c = 0; c < width; ++c) packed[r * width + c] = from[r * row_step + c * column_step];
      }
    }
    return {packed, width};
  }
};

// Of a single row it may be anything.
int64_t row_step(const Tensor& matrix) { return matrix.shape[0] == 1 ? matrix.shape[1] : matrix.strides[0]; }

// The library makes code for each shape, and keeps it: so few heights, whatever the number of tokens.
int64_t height_of_block(int64_t rows) { return rows > kUnit ? rows / kUnit * kUnit : rows; }

// out = left right, of one task.
void multiply_task(BlockProduct product, const Tensor& left, const Right& right, const Tensor& out, const Blocks& blocks,
                   int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
  thread_local Room<float> room;
  const auto* from = reinterpret_cast<const float*>(left.data);
  auto* to = reinterpret_cast<float*>(out.data);
  const int64_t inner = left.shape[1], from_step = row_step(left), to_step = row_step(out);
  for (int64_t k = 0; k < inner; k += blocks.depth) {
    const int64_t depth = std::min(blocks.depth, inner - k);
    for (int64_t column = column_begin; column < column_end; column += blocks.width) {
      const int64_t width = std::min(blocks.width, column_end - column);
      const Panel panel = right.panel(k, depth, column, width, room);
      for (int64_t row = row_begin, height; row < row_end; row += height) {
        height = height_of_block(std::min(blocks.height, row_end - row));
        product.multiply(height, width, depth, from_step, panel.step, to_step, k > 0, from + row * from_step + k, panel.data,
                         to + row * to_step + column, false);
      }
    }
  }
  product.release(false);
}

int64_t threads_for(const Tensor& left, const Tensor& out) {
  return out.shape[0] * out.shape[1] * left.shape[1] < kSerialProduct ? 1 : get_num_threads();
}

// The length of even parts, a multiple of `unit`.
int64_t even_part(int64_t length, int64_t parts, int64_t unit) { return divided(divided(length, parts), unit) * unit; }

}  // namespace

// A task is some tokens with all features, which it adds up while it walks the classes; or some features, where tokens are few.
void hidden_product(BlockProduct product, const Tensor& grad, const Tensor& weight, const Tensor& out) {
  constexpr int64_t kHeight = 256, kWidth = 128, kDepth = 256;
  const int64_t rows = out.shape[0], columns = out.shape[1], threads = threads_for(grad, out);
  if (rows * columns == 0) return;
  const int64_t blocks = std::max<int64_t>(1, (rows + kHeight / 2) / kHeight);
  const int64_t down = blocks < threads ? blocks : (blocks + threads / 2) / threads * threads;
  const int64_t height = even_part(rows, down, kUnit), width = even_part(columns, divided(threads, down), kPanel);
  const Right right{reinterpret_cast<const float*>(weight.data), weight.shape[1], weight.strides[0], weight.strides[1]};
  const int64_t across = divided(columns, width);
  parallel_for(divided(rows, height) * across, get_num_threads(), [&](int64_t task) {
    const int64_t row = task / across * height, column = task % across * width;
    multiply_task(product, grad, right, out, {height, kWidth, kDepth}, row, std::min(rows, row + height), column,
                  std::min(columns, column + width));
  });
}

// ---- left transposed -------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kBlockClasses = 128;  // classes of one block
constexpr int64_t kPieceTokens = 2048;  // tokens of one product: their factor of a block stays in L2

// How many tokens lie side by side in a packed factor: a dot product of bfloat16 takes them in pairs.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;

// Panels of features, each [tokens / kTogether][feature][kTogether], with zeros behind the last token.
template <class T>
std::vector<T> packed_panels(const Tensor& rows) {
  constexpr int64_t kStep = kTogether<T>;
  const int64_t tokens = rows.shape[0], features = rows.shape[1];
  const int64_t groups = divided(tokens, kUnit) * kUnit / kStep;
  std::vector<T> out(groups * kStep * features);
  for (int64_t first = 0; first < features; first += kPanel) {
    const int64_t width = std::min(kPanel, features - first);
    T* panel = out.data() + first * groups * kStep;
    for (int64_t token = 0; token < tokens; ++token) {
      const T* from = reinterpret_cast<const T*>(rows.data) + token * rows.strides[0] + first;
      T* to = panel + token / kStep * width * kStep + token % kStep;
      for (int64_t i = 0; i < width; ++i) to[kStep * i] = from[i];
    }
  }
  return out;
}

template <class T>
void product_of(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add, const Tensor& rounded) {
  const int64_t tokens = grad.shape[0], classes = grad.shape[1], features = hidden.shape[1];
  const int64_t whole = divided(tokens, kUnit) * kUnit;  // zeros follow the tokens
  const std::vector<T> panels = packed_panels<T>(hidden);
  const bool stream = rounded && classes * features * itemsize_of(rounded.dtype) >= kStreamBytes;
  parallel_for(divided(classes, kBlockClasses), get_num_threads(), [&](int64_t block) {
    thread_local std::vector<T> factor;
    thread_local Room<float> room;
    const int64_t first = block * kBlockClasses;
    const int64_t count = std::min(kBlockClasses, classes - first);
    const bool one_piece = whole <= kPieceTokens;
    float* const own = total ? nullptr : room.of(kBlockClasses * (one_piece ? kPanel : features));  // sums, without a total
    for (int64_t begin = 0; begin < whole; begin += kPieceTokens) {
      const int64_t length = std::min(kPieceTokens, whole - begin);
      const bool last = begin + length == whole;
      const int64_t factor_step = length + 64 / sizeof(T);  // no multiple of a page
      factor.assign(kBlockClasses * factor_step, T(0));
      transpose_block(reinterpret_cast<const T*>(grad.data) + begin * grad.strides[0] + first, std::min(length, tokens - begin),
                      grad.strides[0], count, factor_step, factor.data());
      for (int64_t feature = 0; feature < features; feature += kPanel) {
        const int64_t width = std::min(kPanel, features - feature);
        float* const sums = total ? total + first * features + feature : one_piece ? own : own + feature * kBlockClasses;
        const int64_t step = total ? features : width;
        product.multiply(count, width, length, factor_step, width, step, add || begin > 0, factor.data(),
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
