// SPDX-License-Identifier: Apache-2.0
// The kernels for one storage type T, and the table of their launches.
#include <algorithm>

#include "kernel_table.hpp"
#include "one_trip.hpp"
#include "sample.hpp"
#include "sparse.hpp"

namespace fastloss {
namespace {

// Sums over what a thread takes of its row, then over its warp.
template <class T, class V, bool kAdjacent, Form kForm>
__device__ inline Part scan(const Problem& p, const Place& at, bool skip, const Ring& ring) {
  RowScan<V, kForm, kAdjacent> scan;
  if (!skip) {
    const T* row = row_of<const T>(p, p.logits, at.row);
    walk_fetched<T, kAdjacent>(p, at, row, scan.kMissing, ring,
                               [&](const auto& run, const auto& fetched) { scan.take(p, at.row, run, fetched); });
  }
  return scan.part();
}

template <class T, class V>
__device__ inline void finish_row(const Problem& p, const Loss& loss, const Statistics& out, int64_t row, const RowStats& stats,
                                  int lane, int lanes) {
  if (loss.wanted) {
    if (lane != 0) return;
    SavedRow saved;
    const double value = loss_of_row<V>(p, loss, target_of<T, V>(p, loss, row), stats, saved);
    write_loss<typename V::T>(loss, row, value, saved);
  } else {
    finish_statistics<T, V>(p, out, row, stats, lane, lanes);
  }
}

// The gradient of a row whose coefficients a thread has just left in shared memory; g goes with a lone target.
template <class T, class V, bool kAdjacent, bool kFull>
__device__ inline void write_row(const Problem& p, const Place& at, const GradientRow& c, const UpstreamsOfRow& row_g,
                                 const Ring& ring) {
  __syncthreads();
  const T* row = row_of<const T>(p, p.logits, at.there ? at.row : 0);
  const Span span = span_of<T, kAdjacent>(p, at, row);
  const auto mine = [&](int i) {
    if (!at.there || c.zero || i >= p.ids.k) return false;
    const int64_t id = id_at(p.ids, at.row * p.ids.k + i);
    return id >= span.begin && id < span.end && !occurs_before(IdsOfRow{p.ids, at.row}, i);
  };
  // In place, the logits of the targets must be read before anything is written.
  const bool first = mine(at.lane);
  const auto kept = first ? target_gradient<T, V>(p, c, at.row, row_g, at.lane) : 0;
  __syncthreads();
  if (at.there) write_gradient<T, V, kAdjacent, kFull>(p, at, c, ring);
  __syncthreads();
  T* out = row_of<T>(p, p.grad, at.there ? at.row : 0);
  const auto put_target = [&](int i, typename V::T value) {
    put(value, out[id_at(p.ids, at.row * p.ids.k + i) * p.grad.class_step]);
  };
  if (first) put_target(at.lane, kept);
  for (int i = at.lane + at.lanes; i < p.ids.k; i += at.lanes) {
    if (mine(i)) put_target(i, target_gradient<T, V>(p, c, at.row, row_g, i));
  }
}

// Shared memory for one thing a row, or a part of a row: one a warp, or a thread where 32 rows share the warps.
template <bool kAdjacent>
constexpr int kPlaces = kAdjacent ? kThreads / kWarp : kThreads;

// The warps of a row lie side by side in shared memory, or 32 apart where 32 rows share them; so do rows themselves.
template <bool kAdjacent>
struct SharedRow {
  static constexpr int kStep = kAdjacent ? 1 : kWarp;
  int column;       // of the 32 rows
  bool is_leader;   // one thread a row
  int lane, lanes;  // that finish the row together
  __device__ explicit SharedRow(const Place& at)
      : column(kAdjacent ? 0 : threadIdx.x % kWarp),
        is_leader(at.lane == 0),
        lane(kAdjacent ? threadIdx.x % kWarp : 0),
        lanes(kAdjacent ? kWarp : 1) {}
  __device__ int row(const Place& at) const { return at.slot * kStep + column; }
  __device__ int part(const Problem& p, const Place& at) const {
    return (at.slot * p.warps_per_row + at.warp) * kStep + column;
  }
};

// All of a row in one block: its statistics, and with kGradient the gradient as well, which finds the row in a cache; for rows
// whose classes lie side by side, one_trip.hpp has that. More parts a row: each block leaves its sums for merge_kernel. Without
// memory for the gradient it makes the statistics alone, to the same bits.
template <class T, bool kAdjacent, Form kForm, bool kGradient>
FASTLOSS_KERNEL(kThreads, blocks_for(sizeof(T), kForm == Form::kFull))
scan_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT Statistics out,
            FASTLOSS_ARGUMENT GradientSource source) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  FASTLOSS_SHARED(Part[kPlaces<kAdjacent>], parts);
  FASTLOSS_SHARED_VECTORS(vectors);
  const Ring ring(vectors, p.batches);
  const Place at = place(p);
  const SharedRow<kAdjacent> shared(at);
  const bool skip = !at.there || (loss.wanted && label_of<A>(p, loss, at.row).ignored);
  const Part part = scan<T, V, kAdjacent, kForm>(p, at, skip, ring);
  const bool speaks = !kAdjacent || shared.lane == 0;
  if (p.parts > 1) {
    if (speaks && at.there) p.part[(at.row * p.parts + at.part) * p.warps_per_row + at.warp] = part;
    return;
  }
  if (speaks) parts[shared.part(p, at)] = part;
  __syncthreads();
  if (at.warp == 0 && at.there) {
    const RowStats stats = merge_parts<kAdjacent>(parts + shared.part(p, at), p.warps_per_row, shared.kStep);
    finish_row<T, V>(p, loss, out, at.row, stats, shared.lane, shared.lanes);
  }
  if constexpr (kGradient) {
    if (!p.grad.data) return;
    FASTLOSS_SHARED(GradientRow[kPlaces<kAdjacent>], coefficients);
    double g = 0.0;
    if (shared.is_leader && at.there) {
      coefficients[shared.row(at)] = coefficients_of<A>(p, loss, source, loss.saved, at.row, g);
    }
    write_row<T, V, kAdjacent, kForm == Form::kFull>(p, at, coefficients[shared.row(at)], {nullptr, g}, ring);
  }
}

// A block a row, of one warp.
template <class T>
FASTLOSS_KERNEL(kWarp, 1)
merge_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT Statistics out) {
  using V = typename AccumulatedIn<T>::V;
  const int64_t row = blockIdx.x;
  const int count = p.parts * p.warps_per_row;
  if (loss.wanted && label_of<typename V::T>(p, loss, row).ignored) {
    finish_row<T, V>(p, loss, out, row, RowStats{}, threadIdx.x, kWarp);
    return;
  }
  finish_row<T, V>(p, loss, out, row, merge_parts<true>(p.part + row * count, count, 1), threadIdx.x, kWarp);
}

template <class T, bool kAdjacent, bool kFull>
FASTLOSS_KERNEL(kThreads, blocks_for(sizeof(T), kFull))
gradient_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT GradientSource source,
                const SavedRow* saved) {
  using V = typename AccumulatedIn<T>::V;
  FASTLOSS_SHARED(GradientRow[kPlaces<kAdjacent>], coefficients);
  FASTLOSS_SHARED_VECTORS(vectors);
  if (made_by_forward(source)) return;
  const Ring ring(vectors, p.batches);
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Place at = place(p, block);
    const SharedRow<kAdjacent> shared(at);
    double g = 0.0;
    if (shared.is_leader && at.there) {
      coefficients[shared.row(at)] = coefficients_of<typename V::T>(p, loss, source, saved, at.row, g);
    }
    write_row<T, V, kAdjacent, kFull>(p, at, coefficients[shared.row(at)],
                                      {loss.wanted ? nullptr : source.g + at.row * p.ids.k, g}, ring);
    __syncthreads();  // before the next coefficients take the place of these
  }
}

// One target after the other: how many classes a stable descending sort puts before it.
template <class T, bool kAdjacent>
FASTLOSS_KERNEL(kThreads, 1)
rank_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Statistics out) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  FASTLOSS_SHARED(double[kPlaces<kAdjacent>], counts);
  FASTLOSS_SHARED_VECTORS(vectors);
  const Ring ring(vectors, p.batches);
  const Place at = place(p);
  const SharedRow<kAdjacent> shared(at);
  const T* row = row_of<const T>(p, p.logits, at.there ? at.row : 0);
  for (int i = 0; i < p.ids.k; ++i) {
    const int64_t id = at.there ? id_at(p.ids, at.row * p.ids.k + i) : -1;
    const bool valid = id >= 0 && id < p.classes && out.saved[at.row].rest >= 0.0;
    double count = 0.0;
    if (valid) {
      const A target_z = logit_at<T, V>(p, row, id).z;
      walk_logits<T, V, kAdjacent>(p, at, row, A(0), ring, [&](const auto& run, auto& z) {
        constexpr int kSize = sizeof(z) / sizeof(A);
        A derivative[kSize];
        transform_run<V>(p, run, z, derivative);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          count += run.has(j) && (z[j] > target_z || (z[j] == target_z && run.column(j) < id)) ? 1.0 : 0.0;
        }
      });
    }
    if (kAdjacent) count = sum_over_warp(count);
    __syncthreads();
    if (!kAdjacent || shared.lane == 0) counts[shared.part(p, at)] = count;
    __syncthreads();
    if (!shared.is_leader || !at.there) continue;
    double total = 0.0;
    for (int w = 0; w < p.warps_per_row; ++w) total += counts[shared.part(p, at) + w * shared.kStep];
    out.rank[at.row * p.ids.k + i] = valid ? static_cast<int64_t>(total) : -1;
  }
}

template <class T, bool kAdjacent>
FASTLOSS_KERNEL(kThreads, 1)
soft_gradient_kernel(FASTLOSS_ARGUMENT Problem p, FASTLOSS_ARGUMENT Loss loss, FASTLOSS_ARGUMENT GradientSource source,
                     const SavedRow* saved) {
  using V = typename AccumulatedIn<T>::V;
  using A = typename V::T;
  FASTLOSS_SHARED_VECTORS(vectors);
  const Ring ring(vectors, p.batches);
  const Place at = place(p);
  if (!at.there) return;
  const T* row = row_of<const T>(p, p.logits, at.row);
  const A scale = static_cast<A>(upstream_of(source, at.row) * (1.0 - loss.label_smoothing));
  const A max = static_cast<A>(saved[at.row].max);
  const A log_sum = static_cast<A>(log1p_nonnegative<CudaF64>(saved[at.row].rest));
  walk_logits<T, V, kAdjacent>(p, at, row, A(0), ring, [&](const auto& run, auto& z) {
    constexpr int kSize = sizeof(z) / sizeof(A);
    A derivative[kSize], w[kSize];
    transform_run<V>(p, run, z, derivative);
    load_per_class(static_cast<const A*>(p.weight), run, w);
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = soft_gradient_at<V>(z[i], w[i], max, log_sum, scale);
    store_any(p, z, run, p.grad, at.row);
  });
}

// ---- launches --------------------------------------------------------------------------------------------------------------

inline LaunchShape shape_of(const Problem& p) {
  const int64_t rows = kThreads / kWarp / p.warps_per_row * (p.adjacent ? 1 : kWarp);
  return {(p.rows + rows - 1) / rows, p.parts, kThreads, false, shared_bytes_of(p)};
}

template <Form kForm>
using FormTag = std::integral_constant<Form, kForm>;

// Calls f with the constants that choose a kernel: (adjacent, form).
template <class F>
void choose(const Problem& p, Form form, F f) {
  const auto with_form = [&](auto adjacent) {
    form == Form::kFull      ? f(adjacent, FormTag<Form::kFull>{})
    : form == Form::kMoments ? f(adjacent, FormTag<Form::kMoments>{})
                             : f(adjacent, FormTag<Form::kPlain>{});
  };
  p.adjacent ? with_form(std::true_type{}) : with_form(std::false_type{});
}

template <class T>
void launch_scan(const Problem& p, const Loss& loss, const Statistics& out, cudaStream_t stream) {
  choose(p, form_of(p), [&](auto adjacent, auto form) {
    launch(scan_kernel<T, adjacent.value, form.value, false>, shape_of(p), stream, p, loss, out, GradientSource{});
  });
}

template <class T>
void launch_one_trip(const Problem& p, const Loss& loss, const GradientSource& source, cudaStream_t stream) {
  LaunchShape shape = shape_of(p);
  const bool full = form_of(p) == Form::kFull;
  if (p.adjacent) {
    shape.blocks = (shape.blocks + p.turns - 1) / p.turns;
    shape.clusters = p.parts > 1;
    const auto with = [&](auto whole) {
      full ? launch(one_trip_kernel<T, whole.value, true>, shape, stream, p, loss, source)
           : launch(one_trip_kernel<T, whole.value, false>, shape, stream, p, loss, source);
    };
    p.warps_per_row == kThreads / kWarp ? with(std::true_type{}) : with(std::false_type{});
  } else {
    full ? launch(scan_kernel<T, false, Form::kFull, true>, shape, stream, p, loss, Statistics{}, source)
         : launch(scan_kernel<T, false, Form::kPlain, true>, shape, stream, p, loss, Statistics{}, source);
  }
}

template <class T>
void launch_merge(const Problem& p, const Loss& loss, const Statistics& out, cudaStream_t stream) {
  launch(merge_kernel<T>, {p.rows, 1, kWarp}, stream, p, loss, out);
}

template <class T>
void launch_rank(const Problem& p, const Statistics& out, cudaStream_t stream) {
  p.adjacent ? launch(rank_kernel<T, true>, shape_of(p), stream, p, out)
             : launch(rank_kernel<T, false>, shape_of(p), stream, p, out);
}

// So many are soon gone where forward has made the gradient; each takes several rows where there are more.
constexpr int64_t kMostGradientBlocks = 4096;

template <class T>
void launch_gradient(const Problem& p, const Loss& loss, const GradientSource& source, const SavedRow* saved,
                     cudaStream_t stream) {
  choose(p, source.coefficients ? Form::kFull : form_of(p), [&](auto adjacent, auto form) {
    Problem rows = p;
    LaunchShape shape = shape_of(p);
    rows.blocks = shape.blocks;
    shape.blocks = std::min(shape.blocks, kMostGradientBlocks);
    launch(gradient_kernel<T, adjacent.value, form.value == Form::kFull>, shape, stream, rows, loss, source, saved);
  });
}

template <class T>
void launch_soft_gradient(const Problem& p, const Loss& loss, const GradientSource& source, const SavedRow* saved,
                          cudaStream_t stream) {
  p.adjacent ? launch(soft_gradient_kernel<T, true>, shape_of(p), stream, p, loss, source, saved)
             : launch(soft_gradient_kernel<T, false>, shape_of(p), stream, p, loss, source, saved);
}

template <class T>
constexpr KernelTable kernel_table() {
  return {&launch_scan<T>,          &launch_one_trip<T>, &launch_merge<T>,    &launch_rank<T>,     &launch_gradient<T>,
          &launch_soft_gradient<T>, &launch_sample<T>,   &launch_multiply<T>, &launch_row_sums<T>, &launch_scale<T>};
}

}  // namespace
}  // namespace fastloss
