// SPDX-License-Identifier: Apache-2.0
// Loss and gradient of rows whose classes lie side by side, in one trip over memory: the blocks of a cluster, or one block,
// hold a row in shared memory until its sums are known. They take some rows one after the other, and fetch the next while they
// write the gradient of the last, so that memory has something to do while threads wait for each other.
#pragma once

#include "gradient.hpp"
#include "statistics.hpp"

namespace fastloss {
namespace {

// A row, or the part of it that a block takes. kWhole: all threads of the block share it.
template <class T, bool kWhole>
struct Stretch {
  using A = typename AccumulatedIn<T>::V::T;
  Place at;
  Label<A> label;
  const T* row;
  Span span;
  Batches<T, kWhole ? kThreads : 0> batches;

  // With the id that id_of has found.
  __device__ Stretch(const Problem& p, const Loss& loss, int64_t block, int64_t id)
      : at(place_of(p, block)),
        label(at.there ? label_of_id<A>(p, loss, id) : Label<A>{}),
        row(kept(row_of<const T>(p, p.logits, at.there ? at.row : 0))),
        span(span_of<T, true>(p, at, row)),
        batches(at, span) {}

  __device__ static int64_t id_of(const Problem& p, int64_t block) {
    const Place at = place_of(p, block);
    return p.ids.data && at.there ? id_at(p.ids, at.row) : 0;
  }
  // A row of the matrix that is not ignored.
  __device__ bool counts() const { return at.there && !label.ignored; }

 private:
  __device__ static Place place_of(const Problem& p, int64_t block) {
    if (!kWhole) return place(p, block);
    const int thread = threadIdx.x;
    return {block, block < p.rows, thread, kThreads, thread / kWarp, 0, static_cast<int>(blockIdx.y)};
  }
};

// All batches of a thread of one row, in shared memory.
template <class T, bool kWhole>
class Shelf {
 public:
  using B = Batches<T, kWhole ? kThreads : 0>;
  using R = typename B::R;

  __device__ explicit Shelf(Vector* shared) : places_(shared + threadIdx.x) {}

  // A group of its own, even where the row has no such batch.
  __device__ void fetch(int i, const T* row, const B& batches) {
    if (i < batches.count) fetch_batch(row, batches[i], places_ + i * kBatchStep);
    end_of_fetch();
    groups_ = i + 1;
  }
  __device__ void fetch_from(int i, const T* row, const B& batches) {
    for (; i < batches.count; ++i) fetch(i, row, batches);
  }

  // Waits for it.
  template <class A>
  __device__ Fetched<T, R> get(const B& batches, int i, A missing) const {
    wait_for_all_but(groups_ - 1 - i);
    return again(batches, i, missing);
  }
  template <class A>
  __device__ Fetched<T, R> again(const B& batches, int i, A missing) const {
    return Fetched<T, R>(places_ + i * kBatchStep, batches[i], missing);
  }

  // The number of a class, for the thread that takes it; false for the others.
  __device__ bool find(const Stretch<T, kWhole>& now, int id, T& number) const {
    constexpr int kRun = B::kRun;
    const Span& span = now.span;
    if (id < span.begin || id >= span.end) return false;
    if (id < span.aligned || id >= now.batches.end) {
      number = now.row[id];
      return id - (id < span.aligned ? span.begin : now.batches.end) == now.at.lane;
    }
    const unsigned vector = static_cast<unsigned>(id - span.aligned) / kRun, lanes = kWhole ? kThreads : now.at.lanes,
                   turn = vector / lanes;
    if (vector % lanes != static_cast<unsigned>(now.at.lane)) return false;
    const Vector* place = places_ + turn / kBatch * kBatchStep + turn % kBatch * kThreads;
    number = reinterpret_cast<const T*>(place)[static_cast<unsigned>(id - span.aligned) % kRun];
    return true;
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

// An element that a thread takes by itself.
template <class T, class R, class A>
__device__ inline Fetched<T, R> fetched_alone(const T* row, const R& run, A missing) {
  return Fetched<T, R>(row, 1, run, missing);
}

// What a warp knows of its part of a row.
template <class V, class T, bool kWhole>
__device__ inline Part scan_once(const Problem& p, const Stretch<T, kWhole>& now, const Shelf<T, kWhole>& shelf) {
  RowScan<V, Form::kFull, true> scan;
  if (now.counts()) {
    const auto take = [&](const auto& run, const auto& fetched) { scan.take(p, now.at.row, run, fetched); };
    const auto take_alone = [&](const auto& run) { take(run, fetched_alone(now.row, run, scan.kMissing)); };
    for_head(now.at, now.span, take_alone);
    for (int i = 0; i < now.batches.count; ++i) take(now.batches[i], shelf.get(now.batches, i, scan.kMissing));
    for_tail(now.at, now.span, now.batches, take_alone);
  }
  return scan.part();
}

// The same of a plain row: it looks for the maximum first, so that no sum ever moves over to another.
template <class V, class T, bool kWhole>
__device__ inline PlainPart scan_twice(const Stretch<T, kWhole>& now, const Shelf<T, kWhole>& shelf) {
  using A = typename V::T;
  constexpr A kMissing = -static_cast<A>(__builtin_huge_val());
  if (!now.counts()) return {};
  const int head = -1, tail = now.batches.count;
  A top = kMissing;
  int place = head;  // the first batch that holds the largest number of this thread
  const auto see = [&](int i, const auto& fetched) {
    const A largest = fetched.template largest<A>();
    if (largest > top) {
      top = largest;
      place = i;
    }
  };
  for_head(now.at, now.span, [&](const auto& run) { see(head, fetched_alone(now.row, run, kMissing)); });
  for (int i = 0; i < tail; ++i) see(i, shelf.get(now.batches, i, kMissing));
  for_tail(now.at, now.span, now.batches, [&](const auto& run) { see(tail, fetched_alone(now.row, run, kMissing)); });

  const A max = max_over_warp(top), ref = finite_reference(max);
  bool owns = top == max && top > kMissing;  // one of the largest of the warp, whose exp(0) = 1 is counted, not summed
  const int owners = count_bits(lanes_where(owns));
  double sum = 0.0;
  const auto add = [&](int i, const auto& fetched_run, const auto& fetched) {
    for_pieces<V, 64>(fetched_run, fetched, [&](const auto&, auto& z) {
      if (owns && place == i) owns = take_away(max, z) < 0;
      sum += sum_of_powers<V>(z, ref);
    });
  };
  const auto add_alone = [&](int i) { return [&, i](const auto& run) { add(i, run, fetched_alone(now.row, run, kMissing)); }; };
  for_head(now.at, now.span, add_alone(head));
  for (int i = 0; i < tail; ++i) add(i, now.batches[i], shelf.again(now.batches, i, kMissing));
  for_tail(now.at, now.span, now.batches, add_alone(tail));
  sum = max == static_cast<A>(__builtin_huge_val()) ? __builtin_nan("") : sum_over_warp(sum);
  return {max, sum + owners, sum + (owners - 1.0)};
}

// What the threads of a row need to know of it.
template <class V>
struct Known {
  RowStats stats;
  GradientRow row;
  GradientTerms<Along<V>> terms;
};

template <class T, bool kWhole, bool kFull>
FASTLOSS_KERNEL(kThreads, blocks_for(sizeof(T), kFull + !kWhole))
one_trip_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT GradientSource source) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  using PartOfRow = std::conditional_t<kFull, Part, PlainPart>;
  constexpr int kWarps = kThreads / kWarp;
  static_assert((2 * kMostOfCluster * sizeof(PartOfRow) + sizeof(Known<V>)) * kWarps + (1 << 10) + 64 <= one_trip_bytes(kFull));
  // Two sets in turn: a block that is ahead does not write what others have yet to read.
  FASTLOSS_SHARED(PartOfRow[2][kWarps * kMostOfCluster], parts);
  FASTLOSS_SHARED(Arrivals[2], arrivals);
  FASTLOSS_SHARED(Known<V>[kWarps], known);
  FASTLOSS_SHARED(double, upstream);
  FASTLOSS_SHARED_VECTORS(vectors);
  const bool in_cluster = kWhole && p.parts > 1;
  if (in_cluster) {
    if (threadIdx.x == 0) {
      begin_arrivals(arrivals[0]);
      begin_arrivals(arrivals[1]);
    }
    cluster_arrive();  // early: the wait comes when all have long begun
  }
  if (threadIdx.x == 0) upstream = upstream_of(source, 0);
  const int lane = threadIdx.x % kWarp;
  const auto block = [&p](int turn) { return int64_t{blockIdx.x} * p.turns + turn; };
  using OfBlock = Stretch<T, kWhole>;
  Shelf<T, kWhole> shelf(vectors);
  OfBlock now(p, loss, block(0), OfBlock::id_of(p, block(0)));
  if (now.counts()) shelf.fetch_from(0, now.row, now.batches);
  for (int turn = 0; turn < p.turns; ++turn) {
    const Place& at = now.at;
    const int64_t next_id = turn + 1 < p.turns ? OfBlock::id_of(p, block(turn + 1)) : 0;  // memory has time to answer
    PartOfRow part;
    if constexpr (kFull) {
      part = scan_once<V>(p, now, shelf);
    } else {
      part = scan_twice<V>(now, shelf);
    }

    // Each block gets the parts of all of them, and works out the same.
    const int warps = kWhole ? kWarps : p.warps_per_row, count = (kWhole ? p.parts : 1) * warps, begin = at.slot * count;
    const int mine = begin + at.part * warps + at.warp, set = turn % 2;
    if (in_cluster) {
      constexpr int kNumbers = kFull ? 7 : 3;
      if (turn == 0) cluster_wait();
      if (threadIdx.x == 0) expect_arrivals(arrivals[set], count * kNumbers * static_cast<int>(sizeof(double)));
      if (lane < p.parts) {
        PartOfRow& there = parts[set][mine];
        const auto give = [&](double PartOfRow::* number) { send(there.*number, lane, part.*number, arrivals[set]); };
        give(&PartOfRow::max);
        give(&PartOfRow::sum);
        give(&PartOfRow::rest);
        if constexpr (kFull) {
          give(&Part::weighted);
          give(&Part::weight);
          give(&Part::soft);
          give(&Part::soft_weight);
        }
      }
      if (at.warp == 0) wait_for_arrivals(arrivals[set], turn / 2);
    } else {
      if (lane == 0) parts[set][mine] = part;
      __syncthreads();
    }
    // All warps of the block have done with the row before, or there would not be all parts of this one.
    Known<V>& c = known[at.slot];
    if (at.warp == 0 && at.there) {
      RowStats stats;
      if constexpr (kFull) {
        stats = merge_parts<true>(parts[set] + begin, count, 1);
      } else {
        stats = merge_plain_parts<V, kWhole ? kWarps * kMostOfCluster : kWarps>(parts[set] + begin, count);
      }
      if (lane == 0) {
        c.stats = stats;
        SavedRow saved;
        loss_of_row<V>(p, loss, {now.label, {}}, stats, saved);
        c.row = coefficients_of_loss(p, loss, now.label, saved, upstream);
        c.terms = RunGradient<V, kFull>::terms_of(p, c.row);
      }
    }
    // The thread that takes the target keeps its logit.
    T x;
    const bool has_target = now.counts() && shelf.find(now, now.label.id, x);
    Transformed<V> logit = {0, 1};
    if (has_target) logit.z = number(x);
    if (kFull && has_target) logit = transformed<V>(p, logit.z, now.label.id);
    __syncthreads();

    const OfBlock next(p, loss, block(turn + 1), next_id);
    const bool fetches = turn + 1 < p.turns && next.counts();
    int fetched = 0;
    T* const out = row_of<T>(p, p.grad, at.there ? at.row : 0);
    if (p.grad.data && at.there) {
      if (c.row.zero) {
        write_zeros<T, V, true>(p, at);
      } else {
        RunGradient<V, kFull> gradient(p, c.row, c.terms, at.row);
        T* const to = kept(out);
        const auto write = [&](const auto& fetched_run, const auto& fetched) {
          for_pieces<V, 32>(fetched_run, fetched, [&](const auto& run, auto& z) {
            gradient.apply(run, z);
            store(z, run, p.grad.class_step, to);
          });
        };
        const auto write_alone = [&](const auto& run) { write(run, fetched_alone(now.row, run, A(0))); };
        for_head(at, now.span, write_alone);
        for (; fetched < now.batches.count; ++fetched) {
          // The next row's takes its place: what a thread has read before it asks for a copy is not overtaken by the copy.
          const auto batch = shelf.again(now.batches, fetched, A(0));
          if (fetches) shelf.fetch(fetched, next.row, next.batches);
          write(now.batches[fetched], batch);
        }
        for_tail(at, now.span, now.batches, write_alone);
      }
    }
    if (fetches) shelf.fetch_from(fetched, next.row, next.batches);

    // What nobody waits for. The gradient of the target takes the place of what this thread has written there.
    if (has_target && p.grad.data) {
      const double one_hot = one_hot_of_loss(loss, now.label, upstream);
      put(target_gradient<V>(p, c.row, now.label.id, logit, one_hot), out[now.label.id * p.grad.class_step]);
    }
    const bool without_target = at.there && at.lane == 0 && at.part == 0 && !has_logit(now.label);
    if (has_target || without_target) {
      RowStats stats = c.stats;
      stats.log_sum = log1p_nonnegative<CudaF64>(stats.rest);
      SavedRow saved;
      const double value = loss_of_row<V>(p, loss, {now.label, logit}, stats, saved);
      write_loss<A>(loss, at.row, value, saved);
    }
    now = next;
  }
}

}  // namespace
}  // namespace fastloss
