// SPDX-License-Identifier: Apache-2.0
// The sampled gradient of a row (../sampled.hpp): a block walks along the row, and what its threads keep of a stretch goes
// behind what they kept before, thread after thread. The target comes first.
#pragma once

#include "../sampled.hpp"
#include "gradient.hpp"

namespace fastloss {
namespace {

constexpr int kBlockWarps = kThreads / kWarp;

// Places for what the threads of a block keep, in the order of the threads. All of them call take() together.
class Places {
 public:
  __device__ Places(int (&kept_of_warp)[2][kBlockWarps], int taken) : kept_of_warp_(kept_of_warp), taken_(taken) {}

  // The first place of this thread.
  __device__ int take(int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int with_me = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = from_lane(with_me, lane >= step ? lane - step : lane);
      if (lane >= step) with_me += before;
    }
    // Two sets of numbers in turn: a warp that is ahead does not write what others have yet to read.
    int (&kept)[kBlockWarps] = kept_of_warp_[turn_];
    turn_ ^= 1;
    if (lane == kWarp - 1) kept[warp] = with_me;
    __syncthreads();
    int first = taken_ + with_me - count;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      if (w < warp) first += kept[w];
      taken_ += kept[w];
    }
    return first;
  }

  __device__ int taken() const { return taken_; }

 private:
  int (&kept_of_warp_)[2][kBlockWarps];
  int turn_ = 0;
  int taken_;  // of less than 2^31 classes
};

// What a thread has found in a run: a bit for each element that is kept, and the column of the first.
struct Found {
  uint32_t kept;
  int first;
};
constexpr int kStretch = 8;  // runs that a thread looks through before what it found in them goes to its places

// Which entries of a row a block keeps, and where they go. All threads look through as many runs. To find out what is kept
// costs a few instructions an element and no word to other threads; what is made of the few that are comes once in a stretch.
template <class T, class V, bool kFull>
class Keeper {
 public:
  using A = typename V::T;

  // Without a `target`, that is -1. It is not looked for: it is kept in any case.
  __device__ Keeper(const Problem& p, const GradientRow& c, int64_t row, const Sample& sample, A threshold, int target,
                    int (&kept_of_warp)[2][kBlockWarps], Found* found)
      : gradient_(p, c, row),
        row_(row_of<const T>(p, p.logits, row)),
        threshold_(threshold),
        target_(target),
        places_(kept_of_warp, target < 0 ? 0 : 1),
        found_(found + threadIdx.x),
        slots_(static_cast<int>(sample.slots)) {
    const int64_t token = sample.token[row];
    key_ = random_key(static_cast<uint64_t>(*sample.seed), token);
    columns_ = sample.columns + token * sample.slots;
    values_ = static_cast<A*>(sample.values) + token * sample.slots;
  }

  template <class R, class F>
  __device__ void look(const R& run, const F& fetched) {
    static_assert(R::kSize <= 32);
    uint32_t kept = 0;
    int begin = 0;
    for_pieces<V, 32>(run, fetched, [&](const auto& piece, auto& z) {
      constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
      gradient_.apply(piece, z);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (kept_mask<V>(V::abs(z[i]), static_cast<uint32_t>(piece.column(i)), threshold_, key_)) kept |= 1u << (begin + i);
      }
      begin += kSize;
    });
    if (kept != 0) note(run, kept);
    if (++looked_ == kStretch) write();
  }

  // Writes what has been found since the last time.
  __device__ void write() {
    int place = places_.take(count_);
    for (int i = 0; i < noted_; ++i) {
      const Found found = found_[i * kThreads];
      for (uint32_t kept = found.kept; kept != 0; kept &= kept - 1, ++place) {
        if (place < slots_) write(At{found.first, kThreads * At::kRun, 0}.column(first_bit(kept)), place);
      }
    }
    looked_ = noted_ = count_ = 0;
  }

  // By one thread, once all have written. Returns how many places are taken; where they do not suffice, or the row is `lost`,
  // one of them is NaN.
  __device__ int finish(A of_target, bool lost) {
    if (target_ >= 0) {
      columns_[0] = target_;
      values_[0] = of_target;
    } else if (lost) {  // nothing of a row of NaN is large
      columns_[0] = 0;
    }
    const int taken = lost ? 1 : places_.taken();
    if (lost || taken > slots_) values_[0] = static_cast<A>(__builtin_nan(""));
    return taken < slots_ ? taken : slots_;
  }

 private:
  // Where the elements of a run lie; that of a single element is alike.
  using At = typename Batches<T>::R;

  template <class R>
  __device__ void note(const R& run, uint32_t kept) {
    constexpr uint32_t kVector = (1u << R::kRun) - 1;
#pragma unroll
    for (int i = 0; i < R::kSize; i += R::kRun) {
      const auto of_target = static_cast<uint32_t>(target_ - run.column(i));
      if (of_target < R::kRun) kept &= ~(1u << (i + of_target));
      if (!run.has(i)) kept &= ~(kVector << i);
    }
    if (kept == 0) return;
    found_[noted_++ * kThreads] = {kept, run.first};
    count_ += count_bits(kept);
  }

  __device__ void write(int column, int place) {
    const Run<1, 1> run{column, 0, column + 1};
    A z[1];
    Fetched<T, Run<1, 1>>(row_, 1, run, A(0)).numbers(0, z);
    gradient_.apply(run, z);
    columns_[place] = column;
    values_[place] = kept_value(z[0], threshold_);
  }

  RunGradient<V, kFull> gradient_;
  const T* const row_;
  const A threshold_;
  const int target_;
  Places places_;
  Found* const found_;
  const int slots_;
  RandomKey key_;
  int32_t* columns_;
  A* values_;
  int looked_ = 0, noted_ = 0, count_ = 0;
};

template <class T, bool kFull>
FASTLOSS_KERNEL(kThreads, blocks_for(sizeof(T), kFull ? 1 : 0))
sample_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT Sample sample) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  FASTLOSS_SHARED(GradientRow, coefficients);
  FASTLOSS_SHARED(A, target_value);
  FASTLOSS_SHARED(A, threshold);
  FASTLOSS_SHARED(int[2][kBlockWarps], kept_of_warp);
  FASTLOSS_SHARED(Found[kStretch * kThreads], found);
  FASTLOSS_SHARED_VECTORS(vectors);
  const Ring ring(vectors, p.batches);
  const Place at = place(p);
  const Label<A> label = label_of<A>(p, loss, at.row);
  if (p.ids.data && label.ignored) return;  // the whole block
  const bool with_target = p.ids.data && label.valid;
  if (threadIdx.x == 0) {
    double g = 0.0;
    coefficients = coefficients_of<A>(p, loss, {}, loss.saved, at.row, g);
    target_value = with_target ? target_gradient<T, V>(p, coefficients, at.row, {nullptr, g}, 0) : A(0);
    const double target = p.ids.data ? g : 0.0;
    threshold = static_cast<A>(row_threshold(sample.threshold, coefficients, target, p.transform.inv_temperature));
  }
  __syncthreads();
  Keeper<T, V, kFull> keeper(p, coefficients, at.row, sample, threshold, with_target ? label.id : -1, kept_of_warp, found);
  walk_fetched<T, true>(p, at, row_of<const T>(p, p.logits, at.row), A(0), ring,
                        [&](const auto& run, const auto& fetched) { keeper.look(run, fetched); });
  keeper.write();
  __syncthreads();
  const bool lost = coefficients.rest != coefficients.rest;
  if (threadIdx.x == 0) sample.count[sample.token[at.row]] = keeper.finish(target_value, lost);
}

template <class T>
void launch_sample(const Problem& p, const Loss& loss, const Sample& sample, cudaStream_t stream) {
  const LaunchShape shape = {p.rows, 1, kThreads, false, shared_bytes_of(p)};
  form_of(p) == Form::kFull ? launch(sample_kernel<T, true>, shape, stream, p, loss, sample)
                            : launch(sample_kernel<T, false>, shape, stream, p, loss, sample);
}

}  // namespace
}  // namespace fastloss
