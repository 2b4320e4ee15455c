// SPDX-License-Identifier: Apache-2.0
// Between memory and the kernels: a block of a tile as rows of the accumulation type A, class beside class, and back again.
//
// A staged row is padded with -inf to a multiple of kLanes, so that the loops over it have no tails: exp(-inf) adds exactly 0.
#pragma once

#include "numerics.hpp"

namespace fastloss {
namespace {

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline int block_length(int64_t classes, int64_t block) {
  const int64_t left = classes - block * kBlock;
  return left < kBlock ? static_cast<int>(left) : kBlock;
}

template <class A>
struct ScalarOf {
  using V = ScalarF32;
};
template <>
struct ScalarOf<double> {
  using V = ScalarF64;
};

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls f with the storage type of `dtype`.
template <class F>
inline auto with_storage(Dtype dtype, F f) {
  switch (dtype) {
    case kF64:
      return f(TypeTag<double>{});
    case kF16:
      return f(TypeTag<F16>{});
    case kBF16:
      return f(TypeTag<BF16>{});
    default:
      return f(TypeTag<float>{});
  }
}

// Whether V reads and writes the storage type T itself; the other pairs (soft targets of another width) go one by one.
template <class V, class T>
constexpr bool kNative = (sizeof(typename V::T) == 8) == (sizeof(T) == 8);

template <class V, class T>
inline void widen_run(const T* x, int n, typename V::T* z) {
  int i = 0;
  if constexpr (kNative<V, T>) {
    for (; i + V::kWidth <= n; i += V::kWidth) V::store(z + i, V::load(x + i));
  }
  for (; i < n; ++i) z[i] = static_cast<typename V::T>(widen(x[i]));
}

// Writes one register, past the caches if that is wanted and `x` is aligned to what is written.
template <class V, class T>
inline void store_or_stream(T* x, typename V::Reg z, bool stream) {
  if (stream && reinterpret_cast<uintptr_t>(x) % (V::kWidth * sizeof(T)) == 0) {
    V::stream(x, z);
  } else {
    V::store(x, z);
  }
}

template <class V, class T>
inline void narrow_run(const typename V::T* z, int n, T* x, bool stream) {
  int i = 0;
  if constexpr (kNative<V, T>) {
    for (; i + V::kWidth <= n; i += V::kWidth) store_or_stream<V>(x + i, V::load(z + i), stream);
  }
  for (; i < n; ++i) x[i] = narrow<T>(z[i]);
}

template <class T>
inline T* element(const Tile& tile, int64_t row, int64_t column) {
  return reinterpret_cast<T*>(tile.data) + row * tile.row_step + column * tile.class_step;
}

// Rows become columns: as many registers as a register has elements.
template <class V>
inline void transpose(typename V::Reg* square) {
  constexpr int kHalf = V::kWidth / 2;
  for (int stage = 1; stage < V::kWidth; stage *= 2) {
    typename V::Reg zipped[V::kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      zipped[2 * i] = V::zip_low(square[i], square[i + kHalf]);
      zipped[2 * i + 1] = V::zip_high(square[i], square[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < V::kWidth; ++i) square[i] = zipped[i];
  }
}

// Calls whole(row, column) for each square of V::kWidth rows and columns, and single(row, column) for each place outside them.
template <class V, class Whole, class Single>
inline void for_squares(int rows, int columns, bool squares, Whole whole, Single single) {
  for (int column = 0; column < columns; column += V::kWidth) {
    const int width = columns - column < V::kWidth ? columns - column : V::kWidth;
    for (int row = 0; row < rows; row += V::kWidth) {
      const int height = rows - row < V::kWidth ? rows - row : V::kWidth;
      if (squares && width == V::kWidth && height == V::kWidth) {
        whole(row, column);
        continue;
      }
      for (int j = 0; j < width; ++j) {
        for (int r = 0; r < height; ++r) single(row + r, column + j);
      }
    }
  }
}

// Columns [first, first + n) of every row of the tile, at z + row * stride, padded with `padding`.
template <class V>
inline void load_tile(const Tile& tile, int64_t first, int n, int rows, typename V::T padding, typename V::T* z,
                      int64_t stride) {
  using A = typename V::T;
  with_storage(tile.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (tile.class_step == 1) {
      for (int r = 0; r < rows; ++r) widen_run<V>(element<const T>(tile, r, first), n, z + r * stride);
      return;
    }
    const auto turn = [&](int row, int column) {
      if constexpr (kNative<V, T>) {
        // Each class is another place in memory, too many for the hardware to follow: fetch the next ones by hand.
        constexpr int kLineRows = 64 / sizeof(T);
        if (row % kLineRows == 0) {
          for (int j = 0; j < V::kWidth; ++j) __builtin_prefetch(element<const T>(tile, row, first + column + V::kWidth + j));
        }
        typename V::Reg square[V::kWidth];
#pragma GCC unroll 16
        for (int j = 0; j < V::kWidth; ++j) square[j] = V::load(element<const T>(tile, row, first + column + j));
        transpose<V>(square);
#pragma GCC unroll 16
        for (int r = 0; r < V::kWidth; ++r) V::store(z + (row + r) * stride + column, square[r]);
      }
    };
    for_squares<V>(rows, n, kNative<V, T> && tile.row_step == 1, turn, [&](int row, int column) {
      z[row * stride + column] = static_cast<A>(widen(*element<const T>(tile, row, first + column)));
    });
  });
  for (int r = 0; r < rows; ++r) {
    for (int j = n; j < padded(n); ++j) z[r * stride + j] = padding;
  }
}

template <class V>
inline void store_tile(const typename V::T* z, int64_t stride, int64_t first, int n, int rows, const Tile& tile,
                       bool stream = false) {
  with_storage(tile.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (tile.class_step == 1) {
      for (int r = 0; r < rows; ++r) narrow_run<V>(z + r * stride, n, element<T>(tile, r, first), stream);
      return;
    }
    const auto turn = [&](int row, int column) {
      if constexpr (kNative<V, T>) {
        typename V::Reg square[V::kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < V::kWidth; ++r) square[r] = V::load(z + (row + r) * stride + column);
        transpose<V>(square);
#pragma GCC unroll 16
        for (int j = 0; j < V::kWidth; ++j) {
          store_or_stream<V>(element<T>(tile, row, first + column + j), square[j], stream);
        }
      }
    };
    for_squares<V>(rows, n, kNative<V, T> && tile.row_step == 1, turn,
                   [&](int row, int column) { *element<T>(tile, row, first + column) = narrow<T>(z[row * stride + column]); });
  });
}

inline bool is_identity(const Transform& t) { return t.inv_temperature == 1.0 && t.softcap == 0.0 && t.bias == nullptr; }

// z = softcap * tanh(x / temperature / softcap) + bias, and dz/dx where a softcap makes it differ from class to class.
template <class V>
struct Transformed {
  typename V::Reg z, derivative;
};

template <class V>
inline Transformed<V> transform(const Transform& t, typename V::Reg x, typename V::Reg bias) {
  using T = typename V::T;
  const auto slope = V::set(static_cast<T>(t.inv_temperature));
  if (t.softcap == 0.0) return {V::fma(x, slope, bias), slope};
  const auto pair = tanh_with_derivative<V>(V::mul(x, V::set(static_cast<T>(t.inv_temperature / t.softcap))));
  return {V::fma(V::set(static_cast<T>(t.softcap)), pair.value, bias), V::mul(slope, pair.derivative)};
}

// In place over one staged row of n classes; `derivative` may be null. The padding stays -inf.
template <class V>
inline void transform_row(const Transform& t, int64_t first, int n, typename V::T* z, typename V::T* derivative) {
  using T = typename V::T;
  const T* bias = t.bias ? static_cast<const T*>(t.bias) + first : nullptr;
  for (int i = 0; i < n; i += V::kWidth) {
    T padded_bias[V::kWidth] = {};
    const T* b = padded_bias;
    if (bias) {
      if (i + V::kWidth <= n) {
        b = bias + i;
      } else {
        for (int j = i; j < n; ++j) padded_bias[j - i] = bias[j];
      }
    }
    const Transformed<V> out = transform<V>(t, V::load(z + i), V::load(b));
    V::store(z + i, out.z);
    if (derivative) V::store(derivative + i, out.derivative);
  }
  for (int j = n; j < padded(n); ++j) z[j] = -static_cast<T>(__builtin_huge_val());
}

template <class A>
struct Staged {
  const A* z;
  int64_t stride;  // from one row of the tile to the next
};

// The block as rows of z. A full block of one row that needs no conversion is read where it lies.
template <class V>
inline Staged<typename V::T> stage_logits(const Pass& pass, const Tile& logits, int rows, int64_t block, Scratch& scratch,
                                          bool want_derivative = false, bool may_alias = true) {
  using A = typename V::T;
  const int n = block_length(pass.classes, block);
  const bool same_type = logits.dtype == (sizeof(A) == 8 ? kF64 : kF32);
  if (may_alias && same_type && rows == 1 && logits.class_step == 1 && n == kBlock && is_identity(pass.transform)) {
    return {element<const A>(logits, 0, block * kBlock), 0};
  }
  A* z = static_cast<A*>(scratch.logits);
  const int64_t stride = padded(n);
  load_tile<V>(logits, block * kBlock, n, rows, -static_cast<A>(__builtin_huge_val()), z, stride);
  if (!is_identity(pass.transform)) {
    A* derivative = want_derivative && pass.transform.softcap != 0.0 ? static_cast<A*>(scratch.derivative) : nullptr;
    for (int r = 0; r < rows; ++r) {
      transform_row<V>(pass.transform, block * kBlock, n, z + r * stride, derivative ? derivative + r * stride : nullptr);
    }
  }
  return {z, stride};
}

// Class weights of a block (ones where there are none), with zeros behind the last class.
template <class A>
inline const A* stage_weight(const Pass& pass, int64_t block, Scratch& scratch) {
  const int n = block_length(pass.classes, block);
  const A* weight = pass.weight ? static_cast<const A*>(pass.weight) + block * kBlock : nullptr;
  if (weight && n == kBlock) return weight;
  A* out = static_cast<A*>(scratch.weight);
  for (int j = 0; j < padded(n); ++j) out[j] = j >= n ? A(0) : weight ? weight[j] : A(1);
  return out;
}

}  // namespace
}  // namespace fastloss
