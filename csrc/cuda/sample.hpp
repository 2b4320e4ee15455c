// SPDX-License-Identifier: Apache-2.0
// The sampled gradient of a row (../sampled.hpp): a block walks along the row, and what its threads keep of a stretch goes
// behind what they kept before, thread after thread.
#pragma once

#include "../sampled.hpp"
#include "gradient.hpp"

namespace fastloss {
namespace {

constexpr int kBlockWarps = kThreads / kWarp;

// Places for what the threads of a block keep, in the order of the threads. All of them call take() together.
class Places {
 public:
  __device__ explicit Places(int (&kept_of_warp)[2][kBlockWarps]) : kept_of_warp_(kept_of_warp) {}

  // The first place of this thread.
  __device__ int take(int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int with_me = count;
    const bool any = any_lane(count != 0);
    if (any) {
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = from_lane(with_me, lane >= step ? lane - step : lane);
        if (lane >= step) with_me += before;
      }
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
  int taken_ = 0;  // of less than 2^31 classes
};

// Writes what is kept of a run, whose gradient is z. `target` is kept as it is, whatever z holds there.
template <class V>
struct Keeper {
  using A = typename V::T;
  A threshold;
  RandomKey key;
  int target;  // -1: none
  A target_gradient;
  int slots;
  int32_t* columns;
  A* values;

  template <class R>
  __device__ void keep(const R& run, const A (&z)[R::kSize], Places& places) const {
    static_assert(R::kSize <= 32);
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < R::kSize; ++i) {
      const int column = run.column(i);
      const bool large = kept_mask<V>(V::abs(z[i]), static_cast<uint32_t>(column), threshold, key) != 0;
      const bool kept = run.has(i) && (large || column == target);
      mask |= kept ? 1u << i : 0u;
    }
    int place = places.take(count_bits(mask));
    if (mask == 0) return;
#pragma unroll
    for (int i = 0; i < R::kSize; ++i) {
      if ((mask >> i & 1) == 0) continue;
      if (place < slots) {
        const int column = run.column(i);
        columns[place] = column;
        values[place] = column == target ? target_gradient : kept_value(z[i], threshold);
      }
      ++place;
    }
  }
};

template <class T, bool kFull>
FASTLOSS_KERNEL(kThreads, (kFull ? 1 : 2))
sample_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT Sample sample) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  FASTLOSS_SHARED(GradientRow, coefficients);
  FASTLOSS_SHARED(A, target_value);
  FASTLOSS_SHARED(A, threshold);
  FASTLOSS_SHARED(int[2][kBlockWarps], kept_of_warp);
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
  const GradientRow& c = coefficients;
  const int64_t token = sample.token[at.row];
  int32_t* columns = sample.columns + token * sample.slots;
  A* values = static_cast<A*>(sample.values) + token * sample.slots;
  const Keeper<V> keeper{threshold,
                         random_key(static_cast<uint64_t>(*sample.seed), token),
                         with_target ? label.id : -1,
                         target_value,
                         static_cast<int>(sample.slots),
                         columns,
                         values};
  Places places(kept_of_warp);
  RunGradient<V, kFull> gradient(p, c, at.row);
  const T* row = row_of<const T>(p, p.logits, at.row);
  walk_fetched<T, true>(p, at, row, A(0), ring, [&](const auto& fetched_run, const auto& fetched) {
    for_pieces<V, 64>(fetched_run, fetched, [&](const auto& run, auto& z) {
      gradient.apply(run, z);
      keeper.keep(run, z, places);
    });
  });
  __syncthreads();
  if (threadIdx.x != 0) return;
  // Nothing of a row of NaN is large, and without a target nothing would carry the NaN.
  const bool lost = c.rest != c.rest && !with_target;
  if (lost) columns[0] = 0;
  if (lost || places.taken() > sample.slots) values[0] = static_cast<A>(__builtin_nan(""));
  sample.count[token] = lost ? 1 : places.taken() < sample.slots ? places.taken() : sample.slots;
}

template <class T>
void launch_sample(const Problem& p, const Loss& loss, const Sample& sample, cudaStream_t stream) {
  const LaunchShape shape = {p.rows, 1, kThreads, false, shared_bytes_of(p)};
  form_of(p) == Form::kFull ? launch(sample_kernel<T, true>, shape, stream, p, loss, sample)
                            : launch(sample_kernel<T, false>, shape, stream, p, loss, sample);
}

}  // namespace
}  // namespace fastloss
