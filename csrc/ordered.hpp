// SPDX-License-Identifier: Apache-2.0
// Matrix products whose sums have one order, that of their terms: the same bits for any number of threads, any other rows and
// any instruction set. Libraries choose their order by shape, threads and CPU.
#pragma once

#include "staging.hpp"
#include "transpose.hpp"

namespace fastloss {
namespace {

constexpr int kProductRows = 6;  // at a time

// Columns [first, first + columns) of the right factor over depth [from, from + depth), widened and side by side: panel[k *
// kLanes + j] = matrix[first + j][from + k], 0 for j >= columns. A row of the tile is a column of the factor.
template <class V>
void pack_columns(const Tile& matrix, int64_t first, int columns, int64_t from, int64_t depth, typename V::T* panel) {
  using A = typename V::T;
  constexpr int64_t kPiece = 64;  // so many lines of the panel stay in L1
  A piece[kLanes * kPiece];
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      const int64_t step = matrix.class_step;
      if (matrix.row_step == 1) {
        for (int64_t k = 0; k < depth; ++k)
          widen_run<V>(element<const T>(matrix, first, from + k), columns, panel + k * kLanes);
      }
      for (int64_t begin = 0; matrix.row_step != 1 && begin < depth; begin += kPiece) {
        const int64_t count = smaller(kPiece, depth - begin);
        const A* rows = piece;
        int64_t row_step = kPiece;
        if (sizeof(T) == sizeof(A) && step == 1) {
          rows = reinterpret_cast<const A*>(element<const T>(matrix, first, from + begin));
          row_step = matrix.row_step;
        } else {
          for (int j = 0; j < columns; ++j) {
            const T* row = element<const T>(matrix, first + j, from + begin);
            if (step == 1) widen_run<V>(row, static_cast<int>(count), piece + j * kPiece);
            for (int64_t k = 0; k < count && step != 1; ++k) piece[j * kPiece + k] = static_cast<A>(widen(row[k * step]));
          }
        }
        transpose_block(rows, columns, row_step, count, kLanes, panel + begin * kLanes);
      }
      for (int64_t k = 0; k < depth; ++k) {
        for (int j = columns; j < kLanes; ++j) panel[k * kLanes + j] = 0;
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

// The left factor: left[i][k] = data[i / kProductRows * group_step + i % kProductRows * row_step + k * depth_step].
template <class A>
struct Left {
  const A* data;
  int64_t group_step, row_step, depth_step;
  Left from(int64_t row) const {
    return {data + row / kProductRows * group_step + row % kProductRows * row_step, group_step, row_step, depth_step};
  }
};

// What sums begin with: start[i][j] = data[i * row_step + j].
template <class A>
struct Start {
  const A* data;
  int64_t row_step;
};

// out[i][j] = start[i][j] + sum_k left[i][k] panel[k][j] for kRows rows, one fused multiply-add after the other, and that added
// to what is in `out` if it `adds`. `start` may be `out`.
template <class V, int kRows, class T>
void ordered_sums(const Left<typename V::T>& left, const typename V::T* panel, int64_t depth, const Start<typename V::T>& start,
                  T* out, int64_t out_step, bool adds, bool stream) {
  constexpr int kRegs = sizeof(typename V::Reg) == 64 ? 4 : 2;  // kRows of them fit into 32 registers, or into 16
  for (int first = 0; first < kLanes; first += kRegs * V::kWidth) {
    typename V::Reg sum[kRows][kRegs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) sum[i][r] = V::load(start.data + i * start.row_step + first + r * V::kWidth);
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      typename V::Reg column[kRegs];
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) column[r] = V::load(panel + k * kLanes + first + r * V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto factor = V::set(left.data[i * left.row_step + k * left.depth_step]);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) sum[i][r] = V::fma(factor, column[r], sum[i][r]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) {
        T* const to = out + i * out_step + first + r * V::kWidth;
        if constexpr (sizeof(T) == sizeof(typename V::T)) {
          if (adds) sum[i][r] = V::add(V::load(to), sum[i][r]);
        }
        store_or_stream<V>(to, sum[i][r], stream);
      }
    }
  }
}

// Those of all rows of the left factor and the first `width` columns of a panel: kProductRows at a time, what is left one by
// one. `start` is a row of the accumulation type, or null: then sums begin with what is in `out`, to which they are added at
// the end if they `add`. Calls before(row, count) of each.
template <class V, class T, class Before>
void panel_sums(const Left<typename V::T>& left, int64_t rows, const typename V::T* panel, int64_t depth, int64_t width,
                const typename V::T* start, T* out, int64_t out_step, bool add, bool stream, Before before) {
  using A = typename V::T;
  T part[kProductRows * kLanes] = {};  // of a panel that is not full
  const bool full = width == kLanes;
  for (int64_t row = 0; row < rows;) {
    const int count = rows - row >= kProductRows ? kProductRows : 1;
    before(row, count);
    T* const there = out + row * out_step;
    T* const to = full ? there : part;
    const int64_t to_step = full ? out_step : kLanes;
    Start<A> from = {start, 0};
    if constexpr (sizeof(T) == sizeof(A)) {
      for (int i = 0; i < count && (!start || add) && !full; ++i) {
        __builtin_memcpy(part + i * kLanes, there + i * out_step, width * sizeof(T));
      }
      if (!start) from = {to, to_step};
    }
    count == kProductRows ? ordered_sums<V, kProductRows>(left.from(row), panel, depth, from, to, to_step, add, stream && full)
                          : ordered_sums<V, 1>(left.from(row), panel, depth, from, to, to_step, add, stream && full);
    for (int i = 0; i < count && !full; ++i) {
      __builtin_memcpy(there + i * out_step, part + i * kLanes, width * sizeof(T));
    }
    row += count;
  }
}

// Panel after panel of the columns from `begin` to `end`.
template <class V>
void ordered_product(const void* left, int64_t step, int64_t rows, const Tile& matrix, int64_t begin, int64_t end,
                     int64_t depth, const void* bias, const Tile& out, bool stream, void* room) {
  using A = typename V::T;
  const Left<A> from = {static_cast<const A*>(left), kProductRows * step, step, 1};
  A* const panel = static_cast<A*>(room);
  with_storage(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (kNative<V, T>) {
      for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t behind = first + kLanes, next = smaller(kLanes, end - behind);
        const int columns = static_cast<int>(smaller(kLanes, end - first));
        A start[kLanes] = {};
        if (bias) __builtin_memcpy(start, static_cast<const A*>(bias) + first, columns * sizeof(A));
        pack_columns<V>(matrix, first, columns, 0, depth, panel);
        panel_sums<V>(from, rows, panel, depth, columns, start, element<T>(out, 0, first), out.row_step, false, stream,
                      [&](int64_t row, int count) {
                        if (next <= 0) return;
                        fetch_rows(matrix, behind + next * row / rows, behind + next * (row + count) / rows, depth);
                      });
      }
    }
  });
  if (stream) V::fence();
}

// Rows of the left factor where sums read them: in memory; or in `packed`, widened, kProductRows neighbours side by side if the
// matrix is transposed.
template <class V>
Left<typename V::T> left_rows(const Tile& matrix, int64_t first, int64_t rows, int64_t from, int64_t depth,
                              typename V::T* packed) {
  using A = typename V::T;
  return with_storage(matrix.dtype, [&](auto tag) -> Left<A> {
    using T = typename decltype(tag)::Type;
    const T* data = element<const T>(matrix, first, from);
    if (matrix.class_step == 1) {
      if (sizeof(T) == sizeof(A)) {
        return {reinterpret_cast<const A*>(data), kProductRows * matrix.row_step, matrix.row_step, 1};
      }
      for (int64_t i = 0; i < rows; ++i) widen_run<V>(data + i * matrix.row_step, static_cast<int>(depth), packed + i * depth);
      return {packed, kProductRows * depth, depth, 1};
    }
    for (int64_t group = 0; group < rows; group += kProductRows) {
      const auto count = static_cast<int>(smaller(kProductRows, rows - group));
      const bool together = sizeof(T) == sizeof(A) && count == kProductRows && matrix.row_step == 1;
      for (int64_t k = 0; k < depth; ++k) {
        const T* const row = data + group * matrix.row_step + k * matrix.class_step;
        A* const to = packed + group * depth + k * kProductRows;
        // The next rows: each k is another place in memory, which no hardware follows.
        __builtin_prefetch(reinterpret_cast<const char*>(row) + 64);
        if (together) {
          __builtin_memcpy(to, row, kProductRows * sizeof(A));
        } else {
          for (int i = 0; i < count; ++i) to[i] = static_cast<A>(widen(row[i * matrix.row_step]));
        }
      }
    }
    return {packed, kProductRows * depth, 1, kProductRows};
  });
}

// out[i][j] = sum_k left[i][k] right[j][k], for a block of k at a time: of that the right factor is packed, and rows of the
// left factor that share L2 with a panel of the right one.
template <class V>
void product(const Tile& left, int64_t rows, const Tile& right, int64_t columns, int64_t depth, ProductSums sums, void* out,
             int64_t out_step, void* room) {
  using A = typename V::T;
  constexpr A kZeros[kLanes] = {};
  const ProductBlocks blocks = product_blocks(depth);
  A* const packed = static_cast<A*>(room);
  A* const panels = packed + blocks.rows * blocks.depth;
  for (int64_t from = 0; from == 0 || from < depth; from += blocks.depth) {  // an empty sum is 0
    const int64_t count = smaller(blocks.depth, depth - from);
    const bool later = from > 0, apart = sums == ProductSums::kInBlocks;
    const A* const start = apart || (sums == ProductSums::kNew && !later) ? kZeros : nullptr;
    for (int64_t first = 0; first < columns; first += kLanes) {
      pack_columns<V>(right, first, static_cast<int>(smaller(kLanes, columns - first)), from, count, panels + first * count);
    }
    for (int64_t begin = 0; begin < rows; begin += blocks.rows) {
      const int64_t end = smaller(rows, begin + blocks.rows);
      const Left<A> block = left_rows<V>(left, begin, end - begin, from, count, packed);
      for (int64_t first = 0; first < columns; first += kLanes) {
        const int64_t width = smaller(kLanes, columns - first);
        A* const to = static_cast<A*>(out) + begin * out_step + first;
        panel_sums<V>(block, end - begin, panels + first * count, count, width, start, to, out_step, apart && later, false,
                      [&](int64_t row, int) {  // where the next sums go
                        for (int64_t i = row + kProductRows; i < smaller(row + 2 * kProductRows, end - begin); ++i) {
                          for (int64_t j = 0; j < width; j += 64 / sizeof(A)) __builtin_prefetch(to + i * out_step + j, 1);
                        }
                      });
      }
    }
  }
}

}  // namespace
}  // namespace fastloss
