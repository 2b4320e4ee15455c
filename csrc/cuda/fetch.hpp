// SPDX-License-Identifier: Apache-2.0
// From memory to numbers and back, for what a thread takes of a row (walk.hpp). Vectors of logits come through shared memory,
// where each thread has a ring of its own: while it works on one batch of them, the next ones are on their way, and take no
// registers.
#pragma once

#include "walk.hpp"

namespace fastloss {
namespace {

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
      for (int i = 0; i < R::kSize; ++i) element[i] = none;
      for_elements(row, class_step, run, [&](int i, T x) { element[i] = x; });
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
  const T* first = kept(row + run.first);
#pragma unroll
  for (int v = 0; v < kBatch; ++v) {
    if (all || run.has(v * R::kRun)) fetch_vector(place + v * kThreads, first + v * run.step);
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
  if constexpr (R::kRun == 1) {
    for_elements(row, class_step, run, [&](int i, T& element) { put(x[i], element); });
  } else {
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
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (run.has(i)) put(x[i], row[run.column(i) * class_step]);
    }
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
