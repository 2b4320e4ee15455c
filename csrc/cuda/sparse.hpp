// SPDX-License-Identifier: Apache-2.0
// Sums over the entries that sampling kept: a sparse matrix times a dense one. Every sum has one order, and no atomics.
#pragma once

#include "fetch.hpp"

namespace fastloss {
namespace {

constexpr int kRowsOfBlock = kThreads / kWarp;  // a warp a row
constexpr int64_t kLongRow = 256;               // entries from which on the warps of a block share a row
constexpr int kSingleColumns = 8;               // of a lane, where rows do not begin at whole vectors

// Entries [begin, end) of one row.
struct Range {
  int64_t begin, end;
};

__device__ inline Range range_of(const Entries& e, int64_t row) {
  if (e.start) return {e.start[row], e.start[row + 1]};
  return {row * e.slots, row * e.slots + e.count[row]};
}

// An entry: which row of the dense matrix, and its factor.
template <class A>
struct Term {
  int64_t row;
  A factor;
};

template <class A>
__device__ inline Term<A> term_of(const Entries& e, int64_t i) {
  const int64_t place = e.start ? e.order[i] : i;
  const int64_t token = place / e.slots;
  const double value = static_cast<const A*>(e.values)[place];
  return {e.start ? token : e.columns[place], static_cast<A>(value * e.factors[token])};
}

// Adds the terms of a warp's range to its sums over one run of columns, in order. A lane looks up a term, all of them use it.
template <class T, class V, class R>
__device__ inline void add_terms(const Entries& e, const Range& range, const Dense& matrix, const R& run,
                                 typename V::T (&sum)[R::kSize]) {
  using A = typename V::T;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = range.begin; i < range.end; i += kWarp) {
    const Term<A> mine = i + lane < range.end ? term_of<A>(e, i + lane) : Term<A>{0, A(0)};
    const int count = range.end - i < kWarp ? static_cast<int>(range.end - i) : kWarp;
#pragma unroll 4  // loads in flight
    for (int k = 0; k < count; ++k) {
      const T* row = reinterpret_cast<const T*>(matrix.data) + from_lane(mine.row, k) * matrix.width;
      const A factor = from_lane(mine.factor, k);
      const Fetched<T, R> fetched(row, 1, run, A(0));
      A x[R::kSize];
      fetched.numbers(0, x);
#pragma unroll
      for (int j = 0; j < R::kSize; ++j) sum[j] = V::fma(factor, x[j], sum[j]);
    }
  }
}

// Rows of the matrices begin at whole vectors, or else columns go one by one.
template <class T, bool kVectors>
FASTLOSS_KERNEL(kThreads, 2)
multiply_kernel(FASTLOSS_ARGUMENT Entries e, FASTLOSS_ARGUMENT Dense matrix, FASTLOSS_ARGUMENT Dense out) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  constexpr int kRun = kVectors ? kVectorBytes / sizeof(T) : 1, kSize = kVectors ? 2 * kRun : kSingleColumns;
  FASTLOSS_SHARED(A[kRowsOfBlock][kSize * kWarp], sums);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = static_cast<int>(blockIdx.y) * kSize * kWarp;
  const Run<kSize, kRun> run{first + lane * kRun, kRun * kWarp, static_cast<int>(matrix.width)};
  for (int slot = 0; slot < kRowsOfBlock; ++slot) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + slot;
    if (row >= e.rows) return;  // the whole block
    const Range all = range_of(e, row);
    const int64_t count = all.end - all.begin;
    const bool shared = count >= kLongRow;
    if (!shared && warp != slot) continue;
    T* to = reinterpret_cast<T*>(out.data) + row * out.width;
    const Range mine{shared ? all.begin + count * warp / kRowsOfBlock : all.begin,
                     shared ? all.begin + count * (warp + 1) / kRowsOfBlock : all.end};
    A sum[kSize] = {};
    add_terms<T, V>(e, mine, matrix, run, sum);
    if (!shared) {
      store(sum, run, 1, to);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[warp][run.column(i) - first] = sum[i];
    __syncthreads();
    for (int64_t i = threadIdx.x; i < kSize * kWarp && first + i < out.width; i += kThreads) {
      A total = 0;
      for (int w = 0; w < kRowsOfBlock; ++w) total += sums[w][i];
      put(total, to[first + i]);
    }
    __syncthreads();
  }
}

// In double, lane after lane of a warp.
template <class T>
FASTLOSS_KERNEL(kThreads, 1)
row_sums_kernel(FASTLOSS_ARGUMENT Entries e, FASTLOSS_ARGUMENT Dense out) {
  using A = typename AccumulatedIn<T>::V::T;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
  if (row >= e.rows) return;  // the whole warp
  const Range range = range_of(e, row);
  double sum = 0.0;
  for (int64_t i = range.begin + threadIdx.x % kWarp; i < range.end; i += kWarp) sum += term_of<A>(e, i).factor;
  sum = sum_over_warp(sum);
  if (threadIdx.x % kWarp == 0) put(static_cast<A>(sum), reinterpret_cast<T*>(out.data)[row]);
}

template <class T>
FASTLOSS_KERNEL(kThreads, 1)
scale_kernel(T* numbers, int64_t count, FASTLOSS_ARGUMENT DeviceUpstream upstream) {
  using A = typename AccumulatedIn<T>::V::T;
  constexpr int kRun = kVectorBytes / sizeof(T);
  const A factor = static_cast<A>(element(upstream.data, upstream.dtype, 0));
  if (factor == A(1)) return;
  const bool aligned = reinterpret_cast<uintptr_t>(numbers) % kVectorBytes == 0;
  const int64_t vectors = aligned ? count / kRun : 0, threads = int64_t{gridDim.x} * kThreads;
  const int64_t mine = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = mine; i < vectors; i += threads) {
    const Run<kRun, kRun> run = {0, 0, 1};
    T* place = numbers + i * kRun;
    const Fetched<T, Run<kRun, kRun>> fetched(place, 1, run, A(0));
    A x[kRun];
    fetched.numbers(0, x);
#pragma unroll
    for (int j = 0; j < kRun; ++j) x[j] *= factor;
    store(x, run, 1, place);
  }
  for (int64_t i = vectors * kRun + mine; i < count; i += threads) put(number(numbers[i]) * factor, numbers[i]);
}

// ---- launches --------------------------------------------------------------------------------------------------------------

template <class T>
void launch_multiply(const Entries& e, const Dense& matrix, const Dense& out, cudaStream_t stream) {
  const auto aligned = [](const Dense& m) {
    return reinterpret_cast<uintptr_t>(m.data) % kVectorBytes == 0 && m.width * sizeof(T) % kVectorBytes == 0;
  };
  const bool vectors = aligned(matrix) && aligned(out);
  const int64_t columns = kWarp * (vectors ? 2 * kVectorBytes / sizeof(T) : kSingleColumns);
  const LaunchShape shape{(e.rows + kRowsOfBlock - 1) / kRowsOfBlock, static_cast<int>((matrix.width + columns - 1) / columns),
                          kThreads};
  vectors ? launch(multiply_kernel<T, true>, shape, stream, e, matrix, out)
          : launch(multiply_kernel<T, false>, shape, stream, e, matrix, out);
}

template <class T>
void launch_row_sums(const Entries& e, const Dense& out, cudaStream_t stream) {
  launch(row_sums_kernel<T>, {(e.rows + kRowsOfBlock - 1) / kRowsOfBlock, 1, kThreads}, stream, e, out);
}

template <class T>
void launch_scale(const Dense& numbers, const DeviceUpstream& upstream, int blocks, cudaStream_t stream) {
  launch(scale_kernel<T>, {blocks, 1, kThreads}, stream, reinterpret_cast<T*>(numbers.data), numbers.width, upstream);
}

}  // namespace
}  // namespace fastloss
