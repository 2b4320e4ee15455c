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

constexpr int64_t kPanel = 64;          // columns of one product: what a block of registers holds
constexpr int64_t kUnit = 16;           // tokens at once, mostly
constexpr int64_t kBlockClasses = 128;  // classes of one block
constexpr int64_t kPieceTokens = 2048;  // tokens of one product: their factor of a block stays in L2
constexpr int64_t kTogether = 2;        // tokens that lie side by side in a packed factor: a dot product takes them in pairs

// Panels of features, each [tokens / kTogether][feature][kTogether], with zeros behind the last token.
std::vector<uint16_t> packed_panels(const Tensor& rows) {
  const int64_t tokens = rows.shape[0], features = rows.shape[1];
  const int64_t whole = divided(tokens, kUnit) * kUnit;
  std::vector<uint16_t> out(whole * features);
  for (int64_t first = 0; first < features; first += kPanel) {
    const int64_t width = std::min(kPanel, features - first);
    uint16_t* panel = out.data() + first * whole;
    for (int64_t token = 0; token < tokens; ++token) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.data) + token * rows.strides[0] + first;
      uint16_t* to = panel + token / kTogether * width * kTogether + token % kTogether;
      for (int64_t i = 0; i < width; ++i) to[kTogether * i] = from[i];
    }
  }
  return out;
}

}  // namespace

void transposed_product(BlockProduct product, const Tensor& grad, const Tensor& hidden, float* total, bool add,
                        const Tensor& rounded) {
  const int64_t tokens = grad.shape[0], classes = grad.shape[1], features = hidden.shape[1];
  const int64_t whole = divided(tokens, kUnit) * kUnit;  // zeros follow the tokens
  const std::vector<uint16_t> panels = packed_panels(hidden);
  const bool stream = rounded && classes * features * itemsize_of(rounded.dtype) >= kStreamBytes;
  parallel_for(divided(classes, kBlockClasses), get_num_threads(), [&](int64_t block) {
    thread_local std::vector<uint16_t> factor;
    thread_local Room<float> room;
    const int64_t first = block * kBlockClasses;
    const int64_t count = std::min(kBlockClasses, classes - first);
    const bool one_piece = whole <= kPieceTokens;
    float* const own = total ? nullptr : room.of(kBlockClasses * (one_piece ? kPanel : features));  // sums, without a total
    for (int64_t begin = 0; begin < whole; begin += kPieceTokens) {
      const int64_t length = std::min(kPieceTokens, whole - begin);
      const bool last = begin + length == whole;
      const int64_t factor_step = length + 64 / sizeof(uint16_t);  // no multiple of a page
      factor.assign(kBlockClasses * factor_step, uint16_t{0});
      transpose_block(reinterpret_cast<const uint16_t*>(grad.data) + begin * grad.strides[0] + first,
                      std::min(length, tokens - begin), grad.strides[0], count, factor_step, factor.data());
      for (int64_t feature = 0; feature < features; feature += kPanel) {
        const int64_t width = std::min(kPanel, features - feature);
        float* const sums = total ? total + first * features + feature : one_piece ? own : own + feature * kBlockClasses;
        const int64_t step = total ? features : width;
        product.multiply(count, width, length, factor_step, width, step, add || begin > 0, factor.data(),
                         panels.data() + feature * whole + begin * width, sums, true);
        if (!rounded || !last) continue;
        const Tile to{rounded.data + (first * features + feature) * itemsize_of(rounded.dtype), rounded.dtype, features, 1};
        kernels().f32.round(sums, step, count, static_cast<int>(width), to, stream);
      }
    }
    product.release(true);
  });
}

}  // namespace fastloss
