// SPDX-License-Identifier: Apache-2.0
// Where the elements of a row lie, and which of them a thread takes: 16 bytes at a time where classes are neighbours in memory.
#pragma once

#include <type_traits>

#include "device.hpp"
#include "problem.hpp"

namespace fastloss {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kStridedLoads = 8;  // in flight, where each class is a load of its own

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

__device__ inline int64_t row_offset(const Problem& p, const Matrix& matrix, int64_t row) {
  int64_t offset = 0;
  for (int axis = p.axes - 1; axis > 0; --axis) {
    offset += row % p.extents[axis] * matrix.steps[axis];
    row /= p.extents[axis];
  }
  return offset + row * matrix.steps[0];
}

template <class T>
__device__ inline T* row_of(const Problem& p, const Matrix& matrix, int64_t row) {
  return reinterpret_cast<T*>(matrix.data) + row_offset(p, matrix, row);
}

// An element of any dtype.
__device__ inline double element(const void* data, Dtype dtype, int64_t i) {
  return with_storage(dtype,
                      [&](auto tag) -> double { return number(static_cast<const typename decltype(tag)::Type*>(data)[i]); });
}

__device__ inline int64_t id_at(const DeviceIds& ids, int64_t i) {
  return ids.itemsize == 8 ? static_cast<const int64_t*>(ids.data)[i] : static_cast<const int32_t*>(ids.data)[i];
}

// What a thread is: one of the lanes that share a row. All of them are there even for rows behind the last one.
struct Place {
  int64_t row;
  bool there;  // a row of the matrix
  int lane;    // of the threads of this block that share the row
  int lanes;
  int warp;  // of the warps that share the row
  int slot;  // of the rows of this block, or of its groups of 32 rows
  int part;
};

__device__ inline Place place(const Problem& p) {
  Place at;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t slots = blockDim.x / kWarp / p.warps_per_row;
  at.warp = warp % p.warps_per_row;
  at.slot = warp / p.warps_per_row;
  at.part = blockIdx.y;
  const int64_t group = blockIdx.x * slots + at.slot;
  at.row = p.adjacent ? group : group * kWarp + lane;
  at.lane = p.adjacent ? at.warp * kWarp + lane : at.warp;
  at.lanes = p.adjacent ? p.warps_per_row * kWarp : p.warps_per_row;
  at.there = at.row < p.rows;
  return at;
}

// Elements of one row: runs of kRun neighbours, one run every `step` classes, as far as they begin before `end`.
template <int kElements, int kRunLength>
struct Run {
  static constexpr int kSize = kElements, kRun = kRunLength;
  int64_t first, step, end;
  __device__ int64_t column(int i) const { return first + i / kRun * step + i % kRun; }
  __device__ bool has(int i) const { return first + i / kRun * step < end; }
  __device__ bool has_all() const { return has(kSize - 1); }

  // So many of its elements at a time, in registers: all of them have been fetched.
  template <int kPiece>
  __device__ Run<kPiece, kRun> piece(int i) const {
    return {column(i * kPiece), step, end};
  }
};

// The classes of a row that this block takes; from `aligned` on they are whole vectors, and a few more at the end.
struct Span {
  int64_t begin, end, aligned;
};

template <class T, bool kAdjacent>
__device__ inline Span span_of(const Problem& p, const Place& at, const T* row) {
  if constexpr (!kAdjacent) {
    const int64_t begin = p.classes * at.part / p.parts;
    return {begin, p.classes * (at.part + 1) / p.parts, begin};
  } else {
    constexpr int kRun = kVectorBytes / sizeof(T);
    const int64_t to_aligned = (kVectorBytes - reinterpret_cast<uintptr_t>(row) % kVectorBytes) % kVectorBytes / sizeof(T);
    const int64_t head = to_aligned < p.classes ? to_aligned : p.classes;
    const int64_t vectors = (p.classes - head) / kRun;
    const int64_t first = head + vectors * at.part / p.parts * kRun;
    const int64_t last = head + vectors * (at.part + 1) / p.parts * kRun;
    return {at.part == 0 ? 0 : first, at.part == p.parts - 1 ? p.classes : last, first};
  }
}

// Calls body(run) for the elements that a thread takes of its row, columns rising. All lanes of a warp take as many calls, some
// of them without elements.
template <class T, bool kAdjacent, int kLoads, class Body>
__device__ inline void walk(const Problem& p, const Place& at, const T* row, Body body) {
  const Span span = span_of<T, kAdjacent>(p, at, row);
  if constexpr (kAdjacent) {
    constexpr int kRun = kVectorBytes / sizeof(T);
    const int64_t last = span.end - (span.end - span.aligned) % kRun;
    if (span.begin < span.aligned) body(Run<1, 1>{span.begin + at.lane, 0, span.aligned});
    for (int64_t c = span.aligned; c < last; c += kLoads * kRun * at.lanes) {
      body(Run<kLoads * kRun, kRun>{c + at.lane * kRun, at.lanes * kRun, last});
    }
    if (last < span.end) body(Run<1, 1>{last + at.lane, 0, span.end});
  } else {
    for (int64_t c = span.begin; c < span.end; c += kStridedLoads * at.lanes) {
      body(Run<kStridedLoads, 1>{c + at.lane, at.lanes, span.end});
    }
  }
}

// A run as it lies in memory, `missing` where it has no element. All loads come before the first use of one.
template <class T, class R>
struct Fetched {
  static constexpr int kWords = R::kRun > 1 ? R::kSize / R::kRun : 1, kElements = R::kRun > 1 ? 1 : R::kSize;
  Vector vector[kWords];
  T element[kElements];

  template <class A>
  __device__ Fetched(const T* row, int64_t class_step, const R& run, A missing) {
    T none;
    put(missing, none);
    if constexpr (R::kRun > 1) {
      if (run.has_all()) {
#pragma unroll
        for (int v = 0; v < kWords; ++v) vector[v] = *reinterpret_cast<const Vector*>(row + run.column(v * R::kRun));
        return;
      }
      Vector nothing;
#pragma unroll
      for (int i = 0; i < R::kRun; ++i) set(nothing, i, none);
#pragma unroll
      for (int v = 0; v < kWords; ++v) {
        vector[v] = nothing;
        if (run.has(v * R::kRun)) vector[v] = *reinterpret_cast<const Vector*>(row + run.column(v * R::kRun));
      }
    } else {
#pragma unroll
      for (int i = 0; i < R::kSize; ++i) {
        element[i] = none;
        if (run.has(i)) element[i] = row[run.column(i) * class_step];
      }
    }
  }

  // The i-th piece, as numbers of the accumulation type.
  template <int kPiece, class A>
  __device__ void numbers(int i, A (&x)[kPiece]) const {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if constexpr (R::kRun > 1) {
        T raw;
        const int at = i * kPiece + j;
        __builtin_memcpy(&raw, reinterpret_cast<const char*>(&vector[at / R::kRun]) + at % R::kRun * sizeof(T), sizeof(T));
        x[j] = number(raw);
      } else {
        x[j] = number(element[i * kPiece + j]);
      }
    }
  }

  __device__ static void set(Vector& vector, int i, T value) {
    __builtin_memcpy(reinterpret_cast<char*>(&vector) + i * sizeof(T), &value, sizeof(T));
  }
};

// Calls body(run, x) for the pieces of a row that a thread takes: like walk, with the logits as numbers.
template <class T, class V, bool kAdjacent, bool kFull, class Body>
__device__ inline void walk_logits(const Problem& p, const Place& at, const T* row, typename V::T missing, Body body) {
  // In flight: 16 bytes so many times. In registers: as few numbers as keep the loop short of spilling.
  constexpr int kLoads = kFull ? 2 : 4;
  constexpr int kMost = (kFull ? 32 : 64) / sizeof(typename V::T);
  walk<T, kAdjacent, kLoads>(p, at, row, [&](auto run) {
    using R = decltype(run);
    constexpr int kPiece = R::kSize < kMost ? R::kSize : kMost;
    const Fetched<T, R> fetched(row, p.logits.class_step, run, missing);
#pragma unroll
    for (int i = 0; i < R::kSize / kPiece; ++i) {
      typename V::T x[kPiece];
      fetched.numbers(i, x);
      body(run.template piece<kPiece>(i), x);
    }
  });
}

// One number a class, side by side; ones where there are none.
template <class R, class A, int kSize>
__device__ inline void load_per_class(const A* values, const R& run, A (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = !run.has(i) ? A(0) : values ? values[run.column(i)] : A(1);
}

// In place; what lies outside the row stays as it is. `derivative` is dz/dx where a softcap makes it differ from class to
// class, else 1.
template <class V, class R, int kSize>
__device__ inline void transform_run(const Problem& p, const R& run, typename V::T (&z)[kSize],
                                     typename V::T (&derivative)[kSize]) {
  using A = typename V::T;
#pragma unroll
  for (int i = 0; i < kSize; ++i) derivative[i] = 1;
  if (is_identity(p.transform)) return;
  const A* bias = static_cast<const A*>(p.transform.bias);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!run.has(i)) continue;
    const Transformed<V> out = transform<V>(p.transform, z[i], bias ? bias[run.column(i)] : A(0));
    z[i] = out.z;
    if (p.transform.softcap != 0.0) derivative[i] = out.derivative;
  }
}

// A run of a matrix of any dtype, zeros where there is no matrix.
template <class R, class A, int kSize>
__device__ inline void load_any(const Problem& p, const Matrix& matrix, int64_t row, const R& run, A (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = 0;
  if (!matrix.data) return;
  const int64_t offset = row_offset(p, matrix, row);
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const T* data = reinterpret_cast<const T*>(matrix.data) + offset;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (run.has(i)) x[i] = static_cast<A>(number(data[run.column(i) * matrix.class_step]));
    }
  });
}

template <class T, class R, class A, int kSize>
__device__ inline void store(const A (&x)[kSize], const R& run, int64_t class_step, T* row) {
  if constexpr (R::kRun > 1) {
    if (reinterpret_cast<uintptr_t>(row + run.first) % kVectorBytes == 0) {
#pragma unroll
      for (int v = 0; v < kSize / R::kRun; ++v) {
        Vector packed;
#pragma unroll
        for (int i = 0; i < R::kRun; ++i) {
          T element;
          put(x[v * R::kRun + i], element);
          __builtin_memcpy(reinterpret_cast<char*>(&packed) + i * sizeof(T), &element, sizeof(T));
        }
        if (run.has(v * R::kRun)) *reinterpret_cast<Vector*>(row + run.column(v * R::kRun)) = packed;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (run.has(i)) put(x[i], row[run.column(i) * class_step]);
  }
}

// A run into a matrix of any dtype.
template <class R, class A, int kSize>
__device__ inline void store_any(const Problem& p, const A (&x)[kSize], const R& run, const Matrix& matrix, int64_t row) {
  const int64_t offset = row_offset(p, matrix, row);
  with_storage(matrix.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    T* data = reinterpret_cast<T*>(matrix.data) + offset;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (run.has(i))
        put(static_cast<std::conditional_t<sizeof(T) == 8, double, float>>(x[i]), data[run.column(i) * matrix.class_step]);
    }
  });
}

}  // namespace
}  // namespace fastloss
