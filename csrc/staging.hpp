// SPDX-License-Identifier: Apache-2.0
// Between memory and the kernels: a block of a tile as panels of the accumulation type A, and back again.
//
// A panel is what the loops of row.hpp work on: O::kRows rows of n classes, class after class. With Along<V> that is one row,
// and a register holds neighbouring classes; with Across<V> a register holds one class of V::kWidth rows. Memory decides: what
// lies side by side there stays side by side, so nothing is ever transposed.
#pragma once

#include "numerics.hpp"

namespace fastloss {
namespace {

template <class V_>
struct Along {
  using V = V_;
  using T = typename V::T;
  static constexpr int kRows = 1;             // rows in a panel
  static constexpr int kClasses = V::kWidth;  // classes in a register
  FASTLOSS_HD static typename V::Reg per_row(const T* p) { return V::set(*p); }
  FASTLOSS_HD static typename V::Reg per_class(const T* p) { return V::load(p); }
  static void store_per_row(T* p, typename V::Reg x) { *p = V::first(x); }
  // Classes of a panel: whole registers. Those behind the last hold -inf, so that the loops have no tails: exp(-inf) adds
  // exactly 0.
  static int padded(int n) { return (n + kClasses - 1) / kClasses * kClasses; }
};

template <class V_>
struct Across {
  using V = V_;
  using T = typename V::T;
  static constexpr int kRows = V::kWidth;
  static constexpr int kClasses = 1;
  static typename V::Reg per_row(const T* p) { return V::load(p); }
  static typename V::Reg per_class(const T* p) { return V::set(*p); }
  static void store_per_row(T* p, typename V::Reg x) { V::store(p, x); }
  static int padded(int n) { return n; }
};

template <class V>
inline bool lies_across(const Tile& tile, int rows) {
  return tile.row_step == 1 && tile.class_step != 1 && rows >= V::kWidth;
}

template <class O>
inline int panel_count(int rows) {
  return (rows + O::kRows - 1) / O::kRows;
}

// Where class j of a row of the tile lies in its panels.
template <class O>
inline int64_t place(int row, int64_t j, int64_t panel_size) {
  return row / O::kRows * panel_size + j * O::kRows + row % O::kRows;
}

constexpr int kClassesAhead = 4;  // fetched while a tile is loaded

inline int64_t block_count(const Pass& pass) { return (pass.classes + kBlock - 1) / kBlock; }

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
FASTLOSS_HD inline auto with_storage(Dtype dtype, F f) {
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

// Calls single(row, column) for the rows from `begin` on, along the shorter step in memory.
template <class Single>
inline void for_places(const Tile& tile, int begin, int rows, int columns, Single single) {
  if (__builtin_llabs(tile.class_step) < __builtin_llabs(tile.row_step)) {
    for (int r = begin; r < rows; ++r) {
      for (int j = 0; j < columns; ++j) single(r, j);
    }
  } else {
    for (int j = 0; j < columns; ++j) {
      for (int r = begin; r < rows; ++r) single(r, j);
    }
  }
}

// The rows of the tile that whole registers take to and from the panels.
template <class O, class T>
inline int whole_rows(const Tile& tile, int rows) {
  if constexpr (!kNative<typename O::V, T>) return 0;
  if (O::kRows == 1) return tile.class_step == 1 ? rows : 0;
  return tile.row_step == 1 ? rows / O::kRows * O::kRows : 0;
}

// Columns [first, first + n) of every row of the tile, as panels at z, `panel_size` apart. Behind the last class lies
// `padding`, behind the last row 0.
template <class O>
inline void load_tile(const Tile& tile, int64_t first, int n, int rows, typename O::T padding, typename O::T* z,
                      int64_t panel_size) {
  using V = typename O::V;
  using A = typename V::T;
  with_storage(tile.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int whole = whole_rows<O, T>(tile, rows);
    if constexpr (O::kRows == 1 && kNative<V, T>) {
      const int even = n / V::kWidth * V::kWidth;
      for (int r = 0; r < whole; ++r) {
        const T* x = element<const T>(tile, r, first);
        A* out = z + r * panel_size;
        widen_run<V>(x, even, out);
        if (even < n) V::store(out + even, V::load_first(x + even, n - even, V::set(padding)));
      }
    } else if constexpr (kNative<V, T>) {
      for (int j = 0; j < n; ++j) {
        // Each class is another place in memory, too many for the hardware to follow: fetch the next ones by hand.
        const char* ahead = reinterpret_cast<const char*>(element<const T>(tile, 0, first + j + kClassesAhead));
        for (size_t byte = 0; byte < whole * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
        const T* x = element<const T>(tile, 0, first + j);
        A* out = z + j * O::kRows;
        for (int r = 0; r < whole; r += O::kRows, out += panel_size) V::store(out, V::load(x + r));
      }
    }
    for_places(tile, whole, rows, n, [&](int r, int j) {
      z[place<O>(r, j, panel_size)] = static_cast<A>(widen(*element<const T>(tile, r, first + j)));
    });
    for (int r = whole; r < rows; ++r) {
      for (int j = n; j < O::padded(n); ++j) z[r * panel_size + j] = padding;
    }
  });
  for (int r = rows; r < panel_count<O>(rows) * O::kRows; ++r) {
    for (int j = 0; j < n; ++j) z[place<O>(r, j, panel_size)] = 0;
  }
}

// What load_tile did, backwards.
template <class O>
inline void store_tile(const typename O::T* z, int64_t panel_size, int64_t first, int n, int rows, const Tile& tile,
                       bool stream = false) {
  using V = typename O::V;
  with_storage(tile.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int whole = whole_rows<O, T>(tile, rows);
    if constexpr (O::kRows == 1) {
      for (int r = 0; r < whole; ++r) narrow_run<V>(z + r * panel_size, n, element<T>(tile, r, first), stream);
    } else if constexpr (kNative<V, T>) {
      for (int j = 0; j < n; ++j) {
        T* out = element<T>(tile, 0, first + j);
        const typename V::T* x = z + j * O::kRows;
        for (int r = 0; r < whole; r += O::kRows, x += panel_size) store_or_stream<V>(out + r, V::load(x), stream);
      }
    }
    for_places(tile, whole, rows, n,
               [&](int r, int j) { *element<T>(tile, r, first + j) = narrow<T>(z[place<O>(r, j, panel_size)]); });
  });
}

// Memory that is read a while later, fetched bit by bit while arithmetic leaves the memory idle.
class Ahead {
 public:
  // What lies this far behind a block of one row of adjacent classes; of other blocks, nothing new.
  Ahead(const Tile& logits, int rows, int64_t block) {
    if (rows > 1 || logits.class_step != 1) return;
    const int itemsize = with_storage(logits.dtype, [](auto tag) { return int(sizeof(typename decltype(tag)::Type)); });
    at_ = reinterpret_cast<uintptr_t>(logits.data) + block * kBlock * itemsize + kBytes;
    share_ = kLanes * itemsize / kShares;
  }
  Ahead() = default;

  // So many quarters of what follows for another kLanes classes, without a branch: 16-bit logits fetch their lines twice.
  static constexpr int kShares = 4;
  template <class A>
  void fetch(int shares) {
#pragma GCC unroll 8
    for (int line = 0; line < shares * int(kLanes * sizeof(A)) / kShares / 64; ++line) {
      __builtin_prefetch(reinterpret_cast<const char*>(at_ + 64 * line));
    }
    at_ += shares * share_;
  }

 private:
  static constexpr int kBytes = 1 << 14;
  uintptr_t at_ = reinterpret_cast<uintptr_t>(this);  // a place in the caches
  int share_ = 0;
};

FASTLOSS_HD inline bool is_identity(const Transform& t) {
  return t.inv_temperature == 1.0 && t.softcap == 0.0 && t.bias == nullptr;
}

// z = softcap * tanh(x / temperature / softcap) + bias, and dz/dx where a softcap makes it differ from class to class.
template <class V>
struct Transformed {
  typename V::Reg z, derivative;
};

template <class V>
FASTLOSS_HD inline Transformed<V> transform(const Transform& t, typename V::Reg x, typename V::Reg bias) {
  using T = typename V::T;
  const auto slope = V::set(static_cast<T>(t.inv_temperature));
  if (t.softcap == 0.0) return {V::fma(x, slope, bias), slope};
  const auto pair = tanh_with_derivative<V>(V::mul(x, V::set(static_cast<T>(t.inv_temperature / t.softcap))));
  return {V::fma(V::set(static_cast<T>(t.softcap)), pair.value, bias), V::mul(slope, pair.derivative)};
}

// In place over one panel of n classes; `derivative` may be null. The padding stays -inf.
template <class O>
inline void transform_panel(const Transform& t, int64_t first, int n, typename O::T* z, typename O::T* derivative) {
  using V = typename O::V;
  using T = typename V::T;
  const T* bias = t.bias ? static_cast<const T*>(t.bias) + first : nullptr;
  for (int j = 0; j < n; j += O::kClasses) {
    T padded_bias[O::kClasses] = {};
    const T* b = padded_bias;
    if (bias) {
      if (j + O::kClasses <= n) {
        b = bias + j;
      } else {
        for (int i = j; i < n; ++i) padded_bias[i - j] = bias[i];
      }
    }
    const Transformed<V> out = transform<V>(t, V::load(z + j * O::kRows), O::per_class(b));
    V::store(z + j * O::kRows, out.z);
    if (derivative) V::store(derivative + j * O::kRows, out.derivative);
  }
  for (int j = n; j < O::padded(n); ++j) z[j] = -static_cast<T>(__builtin_huge_val());
}

template <class A>
struct Staged {
  const A* z;
  int64_t panel_size;
};

inline bool needs_padding(int n) { return n % kLanes != 0; }

// A block of adjacent classes, of one row, that takes neither padding nor a transform.
inline bool is_panel(const Pass& pass, const Tile& logits, int rows, int n) {
  return rows == 1 && logits.class_step == 1 && !needs_padding(n) && is_identity(pass.transform);
}

// The block as panels of z. One that is a panel already, and needs no conversion, is read where it lies.
template <class O>
inline Staged<typename O::T> stage_logits(const Pass& pass, const Tile& logits, int rows, int64_t block, Scratch& scratch,
                                          bool want_derivative = false, bool may_alias = true) {
  using A = typename O::T;
  const int n = block_length(pass.classes, block);
  const bool same_type = logits.dtype == (sizeof(A) == 8 ? kF64 : kF32);
  if (may_alias && same_type && is_panel(pass, logits, rows, n)) {
    return {element<const A>(logits, 0, block * kBlock), 0};
  }
  A* z = static_cast<A*>(scratch.logits);
  const int64_t size = O::padded(n) * O::kRows;
  load_tile<O>(logits, block * kBlock, n, rows, -static_cast<A>(__builtin_huge_val()), z, size);
  if (!is_identity(pass.transform)) {
    A* derivative = want_derivative && pass.transform.softcap != 0.0 ? static_cast<A*>(scratch.derivative) : nullptr;
    for (int p = 0; p < panel_count<O>(rows); ++p) {
      transform_panel<O>(pass.transform, block * kBlock, n, z + p * size, derivative ? derivative + p * size : nullptr);
    }
  }
  return {z, size};
}

// Where the exponentials of a block are kept, in panels as those of its logits.
template <class O>
inline typename O::T* powers_of(const Pass& pass, const Scanned& scanned, int rows, int64_t block) {
  if (scanned.last_powers && needs_padding(block_length(pass.classes, block)))
    return static_cast<typename O::T*>(scanned.last_powers);
  return static_cast<typename O::T*>(scanned.powers) + block * kBlock * panel_count<O>(rows) * O::kRows;
}

// Class weights of a block (ones where there are none), with zeros behind the last class.
template <class A>
inline const A* stage_weight(const Pass& pass, int64_t block, Scratch& scratch) {
  const int n = block_length(pass.classes, block);
  const A* weight = pass.weight ? static_cast<const A*>(pass.weight) + block * kBlock : nullptr;
  if (weight && !needs_padding(n)) return weight;
  A* out = static_cast<A*>(scratch.weight);
  for (int j = 0; j < (n + kLanes - 1) / kLanes * kLanes; ++j) out[j] = j >= n ? A(0) : weight ? weight[j] : A(1);
  return out;
}

}  // namespace
}  // namespace fastloss
