// SPDX-License-Identifier: Apache-2.0
// A matrix product whose sums have one order, that of the features: the same bits for any number of threads, any other rows and
// any instruction set. Libraries choose their order by shape, threads and CPU.
#pragma once

#include "staging.hpp"
#include "transpose.hpp"

namespace fastloss {
namespace {

// Columns of the right factor, widened and side by side: panel[k * kLanes + j] = matrix[first + j][k], 0 for j >= columns.
template <class V>
void pack_columns(const Tile& matrix, int64_t first, int columns, int64_t depth, typename V::T* panel) {
  using A = typename V::T;
  constexpr int64_t kPiece = 64;  // features: so many lines of the panel stay in L1
  A piece[kLanes * kPiece];
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      const bool adjacent = matrix.class_step == 1;
      for (int64_t begin = 0; begin < depth; begin += kPiece) {
        const int64_t count = smaller(kPiece, depth - begin), step = matrix.class_step;
        const A* from = piece;
        int64_t from_step = kPiece;
        if (sizeof(T) == sizeof(A) && adjacent) {
          from = reinterpret_cast<const A*>(element<const T>(matrix, first, begin));
          from_step = matrix.row_step;
        } else {
          for (int j = 0; j < columns; ++j) {
            const T* row = element<const T>(matrix, first + j, begin);
            if (adjacent) widen_run<V>(row, static_cast<int>(count), piece + j * kPiece);
            for (int64_t k = 0; k < count && !adjacent; ++k) piece[j * kPiece + k] = static_cast<A>(widen(row[k * step]));
          }
        }
        transpose_block(from, columns, from_step, count, kLanes, panel + begin * kLanes);
        for (int64_t k = begin; k < begin + count; ++k) {
          for (int j = columns; j < kLanes; ++j) panel[k * kLanes + j] = 0;
        }
      }
    }
  });
}

// Rows that are packed next come into L2, while arithmetic leaves the memory idle.
inline void fetch_rows(const Tile& matrix, int64_t begin, int64_t end, int64_t depth) {
  if (matrix.class_step != 1) return;
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    for (int64_t row = begin; row < end; ++row) {
      const char* from = reinterpret_cast<const char*>(element<const T>(matrix, row, 0));
      for (int64_t byte = 0; byte < depth * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(from + byte, 0, 2);
    }
  });
}

// out[i][j] = start[j] + sum_k left[i][k] panel[k][j] for kRows rows, one fused multiply-add after the other.
template <class V, int kRows, class T>
void ordered_sums(const typename V::T* left, int64_t step, const typename V::T* panel, int64_t depth,
                  const typename V::T* start, T* out, int64_t out_step, bool stream) {
  constexpr int kRegs = sizeof(typename V::Reg) == 64 ? 4 : 2;  // kRows of them fit into 32 registers, or into 16
  for (int first = 0; first < kLanes; first += kRegs * V::kWidth) {
    typename V::Reg sum[kRows][kRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) sum[i][r] = V::load(start + first + r * V::kWidth);
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      typename V::Reg column[kRegs];
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) column[r] = V::load(panel + k * kLanes + first + r * V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto factor = V::set(left[i * step + k]);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) sum[i][r] = V::fma(factor, column[r], sum[i][r]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) store_or_stream<V>(out + i * out_step + first + r * V::kWidth, sum[i][r], stream);
    }
  }
}

// Panel after panel of the columns from `begin` to `end`.
template <class V>
void ordered_product(const void* left, int64_t step, int64_t rows, const Tile& matrix, int64_t begin, int64_t end,
                     int64_t depth, const void* bias, const Tile& out, bool stream, void* room) {
  using A = typename V::T;
  constexpr int kRows = 6;
  const A* const from = static_cast<const A*>(left);
  A* const panel = static_cast<A*>(room);
  with_storage(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t behind = first + kLanes, next = smaller(kLanes, end - behind);
        const int columns = static_cast<int>(smaller(kLanes, end - first));
        A start[kLanes] = {};
        if (bias) __builtin_memcpy(start, static_cast<const A*>(bias) + first, columns * sizeof(A));
        pack_columns<V>(matrix, first, columns, depth, panel);
        T part[kRows * kLanes];  // of a panel that is not full
        const bool full = columns == kLanes;
        for (int64_t row = 0; row < rows;) {
          const int count = rows - row >= kRows ? kRows : 1;
          if (next > 0) fetch_rows(matrix, behind + next * row / rows, behind + next * (row + count) / rows, depth);
          T* const to = full ? element<T>(out, row, first) : part;
          const int64_t to_step = full ? out.row_step : kLanes;
          count == kRows ? ordered_sums<V, kRows>(from + row * step, step, panel, depth, start, to, to_step, stream && full)
                         : ordered_sums<V, 1>(from + row * step, step, panel, depth, start, to, to_step, stream && full);
          for (int i = 0; i < count && !full; ++i) {
            __builtin_memcpy(element<T>(out, row + i, first), part + i * kLanes, columns * sizeof(T));
          }
          row += count;
        }
      }
    }
  });
  if (stream) V::fence();
}

}  // namespace
}  // namespace fastloss
