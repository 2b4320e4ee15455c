// SPDX-License-Identifier: Apache-2.0
// Sums of rows, and rounded rows: what linear cross-entropy needs besides matrix products.
#pragma once

#include "staging.hpp"

namespace fastloss {
namespace {

// out[h] = sum_k values[k] * matrix[ids[k]][h], in the order of k, rounded once. No k at all gives zeros.
template <class V>
void weighted_rows(const Tile& matrix, int64_t width, const int32_t* ids, const void* values, int64_t count, const Tile& out,
                   bool stream) {
  using A = typename V::T;
  constexpr int kRegs = 8;
  const A* factor = static_cast<const A*>(values);
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      T* to = reinterpret_cast<T*>(out.data);
      int64_t h = 0;
      for (; h + kRegs * V::kWidth <= width; h += kRegs * V::kWidth) {
        typename V::Reg sum[kRegs];
        for (auto& reg : sum) reg = V::set(0);
        for (int64_t k = 0; k < count; ++k) {
          const T* row = element<const T>(matrix, ids[k], h);
          const auto f = V::set(factor[k]);
#pragma GCC unroll 8
          for (int r = 0; r < kRegs; ++r) sum[r] = V::fma(f, V::load(row + r * V::kWidth), sum[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRegs; ++r) store_or_stream<V>(to + h + r * V::kWidth, sum[r], stream);
      }
      using S = typename ScalarOf<A>::V;
      for (; h < width; ++h) {
        A sum = 0;
        for (int64_t k = 0; k < count; ++k) {
          sum = S::fma(factor[k], static_cast<A>(widen(*element<const T>(matrix, ids[k], h))), sum);
        }
        to[h] = narrow<T>(sum);
      }
    }
  });
  if (stream) V::fence();
}

template <class V>
void round(const void* numbers, int64_t step, int64_t rows, int columns, const Tile& out, bool stream) {
  with_storage(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      for (int64_t r = 0; r < rows; ++r)
        narrow_run<V>(static_cast<const typename V::T*>(numbers) + r * step, columns, element<T>(out, r, 0), stream);
    }
  });
  if (stream) V::fence();
}

}  // namespace
}  // namespace fastloss
