// SPDX-License-Identifier: Apache-2.0
// Where the elements of a row lie, and which of them a thread takes: 16 bytes at a time where classes are neighbours in memory.
//
// Those come through shared memory, where each thread has a ring of its own: while it works on one batch of them, the next ones
// are on their way, and take no registers.
#pragma once

#include <type_traits>

#include "device.hpp"
#include "problem.hpp"

namespace fastloss {
namespace {

constexpr int kStridedLoads = 8;  // in flight, where each class is a load of its own

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

__device__ inline Place place(const Problem& p, int64_t block) {
  Place at;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t slots = (kThreads / kWarp) >> p.warps_log2;
  at.warp = warp & (p.warps_per_row - 1);
  at.slot = warp >> p.warps_log2;
  at.part = blockIdx.y;
  const int64_t group = block * slots + at.slot;
  at.row = p.adjacent ? group : group * kWarp + lane;
  at.lane = p.adjacent ? at.warp * kWarp + lane : at.warp;
  at.lanes = p.adjacent ? p.warps_per_row * kWarp : p.warps_per_row;
  at.there = at.row < p.rows;
  return at;
}
__device__ inline Place place(const Problem& p) { return place(p, blockIdx.x); }

// Elements of one row: runs of kRun neighbours, one run every `step` classes, as far as they begin before `end`. A row has less
// than 2^31 classes.
template <int kElements, int kRunLength>
struct Run {
  static constexpr int kSize = kElements, kRun = kRunLength;
  int first, step, end;
  __device__ int column(int i) const { return first + i / kRun * step + i % kRun; }
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
  int begin, end, aligned;
};

template <class T, bool kAdjacent>
__device__ inline Span span_of(const Problem& p, const Place& at, const T* row) {
  const int classes = static_cast<int>(p.classes);
  // Of so many things. Parts differ by one at most.
  const auto begin_of = [&](int part, int of) {
    const int least = of / p.parts, more = of % p.parts;
    return part * least + (part < more ? part : more);
  };
  if constexpr (!kAdjacent) {
    const int begin = begin_of(at.part, classes);
    return {begin, begin_of(at.part + 1, classes), begin};
  } else {
    constexpr int kRun = kVectorBytes / sizeof(T);
    const int to_aligned = (kVectorBytes - reinterpret_cast<uintptr_t>(row) % kVectorBytes) % kVectorBytes / sizeof(T);
    const int head = to_aligned < classes ? to_aligned : classes;
    if (p.parts == 1) return {0, classes, head};
    const int vectors = (classes - head) / kRun;
    const int first = head + begin_of(at.part, vectors) * kRun, last = head + begin_of(at.part + 1, vectors) * kRun;
    return {at.part == 0 ? 0 : first, at.part == p.parts - 1 ? classes : last, first};
  }
}

// The vectors of a span that a thread takes, kBatch at a time. All lanes have as many batches, some of them without elements.
// kLanes: how many lanes there are, where that is known; else 0.
template <class T, int kLanes = 0>
struct Batches {
  static constexpr int kRun = kVectorBytes / sizeof(T);
  using R = Run<kBatch * kRun, kRun>;
  int begin, end, count, lanes;

  __device__ Batches(const Place& at, const Span& span)
      : begin(span.aligned + at.lane * kRun), end(span.end - (span.end - span.aligned) % kRun), lanes(at.lanes) {
    count = (end - span.aligned + kBatch * step() - 1) / (kBatch * step());
  }
  __device__ int step() const { return (kLanes ? kLanes : lanes) * kRun; }
  __device__ R operator[](int i) const { return {begin + i * kBatch * step(), step(), end}; }
  __device__ void advance(R& run) const { run.first += kBatch * step(); }
};

// Calls body(run) for what lies before the vectors of a span, or behind them. A thread takes one element.
template <class Body>
__device__ inline void for_head(const Place& at, const Span& span, Body body) {
  if (span.begin < span.aligned) body(Run<1, 1>{span.begin + at.lane, 0, span.aligned});
}
template <class B, class Body>
__device__ inline void for_tail(const Place& at, const Span& span, const B& batches, Body body) {
  if (batches.end < span.end) body(Run<1, 1>{batches.end + at.lane, 0, span.end});
}

// Calls body(run) for the elements that a thread takes of its row, columns rising. All lanes of a warp take as many calls, some
// of them without elements.
template <class T, bool kAdjacent, class Body>
__device__ inline void walk(const Problem& p, const Place& at, const T* row, Body body) {
  const Span span = span_of<T, kAdjacent>(p, at, row);
  if constexpr (kAdjacent) {
    const Batches<T> batches(at, span);
    for_head(at, span, body);
    auto run = batches[0];
    for (int i = 0; i < batches.count; ++i, batches.advance(run)) body(run);
    for_tail(at, span, batches, body);
  } else {
    for (int c = span.begin; c < span.end; c += kStridedLoads * at.lanes) {
      body(Run<kStridedLoads, 1>{c + at.lane, at.lanes, span.end});
    }
  }
}

template <class A, int kSize>
__device__ inline A largest_of(const A (&x)[kSize]) {
  A top = x[0];
#pragma unroll
  for (int i = 1; i < kSize; ++i) top = larger(x[i], top);
  return top;
}

// One element of a word of 16-bit numbers.
__device__ inline float half_of(uint32_t word, int i, BF16) { return float_of(i == 0 ? word << 16 : word & 0xffff0000u); }
__device__ inline float half_of(uint32_t word, int i, F16) { return number(F16{static_cast<uint16_t>(word >> 16 * i)}); }

// A run as it lies in memory, `missing` where it has no element. All loads come before the first use of one.
template <class T, class R>
struct Fetched {
  static constexpr bool kVectors = R::kRun > 1;
  static constexpr int kWords = kVectors ? R::kSize / R::kRun : 1, kElements = kVectors ? 1 : R::kSize;
  Vector vector[kWords];
  T element[kElements];

  // From memory.
  template <class A>
  __device__ Fetched(const T* row, int64_t class_step, const R& run, A missing) {
    if constexpr (kVectors) {
      gather(run, missing, [&](int v) { return *reinterpret_cast<const Vector*>(row + run.column(v * R::kRun)); });
    } else {
      T none;
      put(missing, none);
#pragma unroll
      for (int i = 0; i < R::kSize; ++i) {
        element[i] = none;
        if (run.has(i)) element[i] = row[run.column(i) * class_step];
      }
    }
  }

  // From where it has come to in shared memory, a vector every kThreads.
  template <class A>
  __device__ Fetched(const Vector* shared, const R& run, A missing) {
    gather(run, missing, [&](int v) { return shared[v * kThreads]; });
  }

  // The i-th piece, as numbers of the accumulation type.
  template <int kPiece, class A>
  __device__ void numbers(int i, A (&x)[kPiece]) const {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const int at = i * kPiece + j;
      if constexpr (!kVectors) {
        x[j] = number(element[at]);
      } else if constexpr (sizeof(T) == 2) {
        x[j] = half_of(vector[at / R::kRun].word[at % R::kRun / 2], at % 2, T());
      } else {
        T raw;
        __builtin_memcpy(&raw, reinterpret_cast<const char*>(&vector[at / R::kRun]) + at % R::kRun * sizeof(T), sizeof(T));
        x[j] = number(raw);
      }
    }
  }

  // Of 16-bit numbers, two are compared at a time.
  template <class A>
  __device__ A largest() const {
    if constexpr (kVectors && sizeof(T) == 2) {
      uint32_t top = vector[0].word[0];
#pragma unroll
      for (int i = 1; i < kWords * kVectorBytes / 4; ++i) top = larger_halves(top, vector[i / 4].word[i % 4], T());
      return larger(half_of(top, 0, T()), half_of(top, 1, T()));
    } else {
      A x[R::kSize];
      numbers(0, x);
      return largest_of(x);
    }
  }

 private:
  template <class A, class Load>
  __device__ void gather(const R& run, A missing, Load load) {
    if (run.has_all()) {
#pragma unroll
      for (int v = 0; v < kWords; ++v) vector[v] = load(v);
      return;
    }
    T none;
    put(missing, none);
    Vector nothing;
#pragma unroll
    for (int i = 0; i < R::kRun; ++i) {
      __builtin_memcpy(reinterpret_cast<char*>(&nothing) + i * sizeof(T), &none, sizeof(T));
    }
#pragma unroll
    for (int v = 0; v < kWords; ++v) {
      vector[v] = nothing;
      if (run.has(v * R::kRun)) vector[v] = load(v);
    }
  }
};

// A batch on its way to shared memory, a vector every kThreads.
template <class T, class R>
__device__ inline void fetch_batch(const T* row, const R& run, Vector* place) {
  const bool all = run.has_all();
#pragma unroll
  for (int v = 0; v < kBatch; ++v) {
    if (all || run.has(v * R::kRun)) fetch_vector(place + v * kThreads, row + run.column(v * R::kRun));
  }
}
constexpr int kBatchStep = kBatch * kThreads;  // from one batch of a thread to the next

// What a thread has of its row in shared memory: kAhead batches, or all if there are less.
class Ring {
 public:
  __device__ Ring(Vector* shared, int batches) : begin_(shared + threadIdx.x), end_(begin_ + batches * kBatchStep) {}

  // Calls body(run, fetched) for the batches of a row.
  template <class T, class A, class Body>
  __device__ void walk(const T* row, const Batches<T>& batches, A missing, Body body) const {
    auto run = batches[0], next = run;
    Vector *place = begin_, *next_place = begin_;
    const auto fetch_next = [&] {
      if (next.has(0)) fetch_batch(row, next, next_place);
      end_of_fetch();
      batches.advance(next);
      advance(next_place);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch_next();
    for (int i = 0; i < batches.count; ++i) {
      wait_for_fetched<kAhead - 1>();
      body(run, Fetched<T, typename Batches<T>::R>(place, run, missing));
      fetch_next();
      batches.advance(run);
      advance(place);
    }
  }

 private:
  __device__ void advance(Vector*& place) const {
    place += kBatchStep;
    if (place == end_) place = begin_;
  }

  Vector *begin_, *end_;
};

// Calls body(run, fetched) for what a thread takes of a row, as walk does; `missing` stands where a run has no element.
template <class T, bool kAdjacent, class A, class Body>
__device__ inline void walk_fetched(const Problem& p, const Place& at, const T* row, A missing, const Ring& ring, Body body) {
  const auto one_by_one = [&](const auto& run) {
    body(run, Fetched<T, std::decay_t<decltype(run)>>(row, p.logits.class_step, run, missing));
  };
  if constexpr (kAdjacent) {
    const Span span = span_of<T, kAdjacent>(p, at, row);
    const Batches<T> batches(at, span);
    for_head(at, span, one_by_one);
    ring.walk(row, batches, missing, body);
    for_tail(at, span, batches, one_by_one);
  } else {
    walk<T, kAdjacent>(p, at, row, one_by_one);
  }
}

// Calls body(run, x) for the pieces of what was fetched: numbers of so many bytes at a time, as many as do not spill.
template <class V, int kBytes, class R, class F, class Body>
__device__ inline void for_pieces(const R& run, const F& fetched, Body body) {
  constexpr int kMost = kBytes / sizeof(typename V::T), kPiece = R::kSize < kMost ? R::kSize : kMost;
#pragma unroll
  for (int i = 0; i < R::kSize / kPiece; ++i) {
    typename V::T x[kPiece];
    fetched.numbers(i, x);
    body(run.template piece<kPiece>(i), x);
  }
}

// Calls body(run, x) for the pieces of a row that a thread takes, with the logits as numbers.
template <class T, class V, bool kAdjacent, class Body>
__device__ inline void walk_logits(const Problem& p, const Place& at, const T* row, typename V::T missing, const Ring& ring,
                                   Body body) {
  walk_fetched<T, kAdjacent>(p, at, row, missing, ring,
                             [&](const auto& run, const auto& fetched) { for_pieces<V, 32>(run, fetched, body); });
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
