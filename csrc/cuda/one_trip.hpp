// SPDX-License-Identifier: Apache-2.0
// Loss and gradient of rows whose classes lie side by side, in one trip over memory: the blocks of a cluster, or one block, hold
// a row in shared memory until its sums are known. They take some rows one after the other, and fetch the next while they write
// the gradient of the last, so that memory has something to do while threads wait for each other.
#pragma once

#include "gradient.hpp"

namespace fastloss {
namespace {

// All batches of a thread of one row, in shared memory.
template <class T>
class Shelf {
 public:
  using R = typename Batches<T>::R;

  __device__ explicit Shelf(Vector* shared) : places_(shared + threadIdx.x) {}

  // A group of its own, even where the row has no such batch.
  __device__ void fetch(int i, const T* row, const Batches<T>& batches) {
    if (i < batches.count) fetch_batch(row, batches[i], places_ + i * kBatchStep);
    end_of_fetch();
    groups_ = i + 1;
  }
  __device__ void fetch_from(int i, const T* row, const Batches<T>& batches) {
    for (; i < batches.count; ++i) fetch(i, row, batches);
  }

  // Waits for it.
  template <class A>
  __device__ Fetched<T, R> get(const Batches<T>& batches, int i, A missing) const {
    wait_for_all_but(groups_ - 1 - i);
    return again(batches, i, missing);
  }
  template <class A>
  __device__ Fetched<T, R> again(const Batches<T>& batches, int i, A missing) const {
    return Fetched<T, R>(places_ + i * kBatchStep, batches[i], missing);
  }

 private:
  // Or for some more.
  __device__ static void wait_for_all_but(int groups) {
    switch (groups) {
      case 0:
        return wait_for_fetched<0>();
      case 1:
        return wait_for_fetched<1>();
      case 2:
        return wait_for_fetched<2>();
      case 3:
        return wait_for_fetched<3>();
      default:
        return wait_for_fetched<4>();
    }
  }

  Vector* places_;
  int groups_ = 0;  // of this row: those of its batches, and perhaps empty ones
};

// A row, or the part of it that a block takes.
template <class T>
struct Stretch {
  Place at;
  const T* row;
  Span span;
  Batches<T> batches;
  bool counts;  // a row of the matrix that is not ignored

  __device__ Stretch(const Problem& p, const Loss& loss, int64_t block)
      : at(place(p, block)),
        row(row_of<const T>(p, p.logits, at.there ? at.row : 0)),
        span(span_of<T, true>(p, at, row)),
        batches(at, span),
        counts(at.there && !label_of<typename AccumulatedIn<T>::V::T>(p, loss, at.row).ignored) {}
};

// An element that a thread takes by itself.
template <class T, class R, class A>
__device__ inline Fetched<T, R> fetched_alone(const T* row, const R& run, A missing) {
  return Fetched<T, R>(row, 1, run, missing);
}

template <class T, bool kFull>
FASTLOSS_KERNEL(kThreads, (kFull ? 2 : 3))
one_trip_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT GradientSource source) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  constexpr int kWarps = kThreads / kWarp;
  // Two sets in turn: a block that is ahead does not write what others have yet to read.
  FASTLOSS_SHARED(Part[2][kWarps * kMostOfCluster], parts);
  FASTLOSS_SHARED(GradientRow[kWarps], coefficients);
  FASTLOSS_SHARED_VECTORS(vectors);
  if (p.parts > 1) cluster_arrive();  // early: the wait comes when all have long begun
  const int lane = threadIdx.x % kWarp;
  const int64_t first_block = int64_t{blockIdx.x} * p.turns;
  Shelf<T> shelf(vectors);
  Stretch<T> now(p, loss, first_block);
  if (now.counts) shelf.fetch_from(0, now.row, now.batches);
  for (int turn = 0; turn < p.turns; ++turn) {
    const Place at = now.at;
    const bool leads = at.lane == 0 && at.there;
    // Asked for early, so that they come while the row does; and in place, before anything is written.
    Target<V> target = {};
    double u = 0.0;
    if (leads) {
      target = target_of<T, V>(p, loss, at.row);
      u = upstream_of(source, at.row);
    }

    RowScan<V, kFull ? Form::kFull : Form::kPlain, true> scan;
    if (now.counts) {
      const auto take = [&](const auto& run, const auto& fetched) { scan.take(p, at.row, run, fetched); };
      const auto take_alone = [&](const auto& run) { take(run, fetched_alone(now.row, run, scan.kMissing)); };
      for_head(at, now.span, take_alone);
      for (int i = 0; i < now.batches.count; ++i) take(now.batches[i], shelf.get(now.batches, i, scan.kMissing));
      for_tail(at, now.span, now.batches, take_alone);
    }
    const Part part = scan.part();

    // Each block gets the parts of all of them, and works out the same.
    const int count = p.parts * p.warps_per_row, first = at.slot * count, mine = first + at.part * p.warps_per_row + at.warp;
    const int set = turn % 2;
    if (p.parts > 1) {
      if (turn == 0) cluster_wait();
      if (lane < p.parts) in_block(parts, lane)[set][mine] = part;
      sync_cluster();
    } else {
      if (lane == 0) parts[set][mine] = part;
      __syncthreads();
    }
    A of_target = 0;
    if (at.warp == 0 && at.there) {
      const RowStats stats = merge_parts<true>(parts[set] + first, count, 1);
      if (lane == 0) {
        SavedRow saved;
        const double value = loss_of_row<V>(p, loss, target, stats, saved);
        if (at.part == 0) write_loss<A>(loss, at.row, value, saved);
        double g = 0.0;
        coefficients[at.slot] = coefficients_of_loss(p, loss, target.label, saved, u, g);
        of_target = target_gradient<V>(p, coefficients[at.slot], target.label.id, target.logit, g);
      }
    }
    __syncthreads();

    const Stretch<T> next(p, loss, first_block + turn + 1);
    const bool fetches = turn + 1 < p.turns && next.counts;
    int fetched = 0;
    if (p.grad.data && at.there) {
      const GradientRow& c = coefficients[at.slot];
      T* out = row_of<T>(p, p.grad, at.row);
      if (c.zero) {
        write_zeros<T, V, true>(p, at);
      } else {
        RunGradient<V, kFull> gradient(p, c, at.row);
        const auto write = [&](const auto& fetched_run, const auto& fetched) {
          for_pieces<V, 32>(fetched_run, fetched, [&](const auto& run, auto& z) {
            gradient.apply(run, z);
            store(z, run, p.grad.class_step, out);
          });
        };
        const auto write_alone = [&](const auto& run) { write(run, fetched_alone(now.row, run, A(0))); };
        for_head(at, now.span, write_alone);
        for (; fetched < now.batches.count; ++fetched) {
          write(now.batches[fetched], shelf.again(now.batches, fetched, A(0)));
          if (fetches) shelf.fetch(fetched, next.row, next.batches);
        }
        for_tail(at, now.span, now.batches, write_alone);
      }
    }
    if (fetches) shelf.fetch_from(fetched, next.row, next.batches);
    if (p.grad.data) {
      __syncthreads();
      const Label& label = target.label;
      const bool mine = leads && has_logit(p, label) && label.id >= now.span.begin && label.id < now.span.end;
      if (mine) put(of_target, row_of<T>(p, p.grad, at.row)[label.id * p.grad.class_step]);
    }
    now = next;
  }
}

}  // namespace
}  // namespace fastloss
