// SPDX-License-Identifier: Apache-2.0
// Where the elements of a row lie, and which of them a thread takes: 16 bytes at a time where classes are neighbours in memory.
#pragma once

#include <type_traits>

#include "device.hpp"
#include "problem.hpp"

namespace fastloss {
namespace {

constexpr int kStridedLoads = 16;  // in flight, where each class is a load of its own

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

// Calls body(i, element) for those elements of a run of single classes that are there. From one to the next an address takes an
// addition, not a product.
template <class T, class R, class Body>
__device__ inline void for_elements(T* row, int64_t class_step, const R& run, Body body) {
  static_assert(R::kRun == 1);
  const auto each = [&](auto all) {
    T* at = row + run.first * class_step;
    const int64_t step = run.step * class_step;
#pragma unroll
    for (int i = 0; i < R::kSize; ++i, at += step) {
      if (all.value || run.has(i)) body(i, *at);
    }
  };
  run.has_all() ? each(std::true_type{}) : each(std::false_type{});
}

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
    const int vectors = (classes - head) / kRun, lines = (vectors + kLine - 1) / kLine;
    const auto class_of = [&](int part) {
      const int vector = begin_of(part, lines) * kLine;
      return head + (vector < vectors ? vector : vectors) * kRun;
    };
    const int first = class_of(at.part), last = class_of(at.part + 1);
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

}  // namespace
}  // namespace fastloss
