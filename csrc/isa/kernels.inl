// SPDX-License-Identifier: Apache-2.0
// The functions of kernels.hpp for one vector type: tiles are cut into blocks, blocks staged, panels handed to row.hpp.
#include "../combine.hpp"
#include "../finish.hpp"
#include "../gradient.hpp"
#include "../ordered.hpp"
#include "../sampled.hpp"

namespace fastloss {
namespace {

// Calls f with the kind of panel that suits the memory of the logits.
template <class V, class F>
inline void with_panels(const Tile& logits, int rows, F f) {
  if (lies_across<V>(logits, rows)) {
    f(TypeTag<Across<V>>{});
  } else {
    f(TypeTag<Along<V>>{});
  }
}

template <class A>
inline Transformed<typename ScalarOf<A>::V> logit_at(const Pass& pass, const Tile& logits, int row, int64_t column) {
  const A x = with_storage(logits.dtype, [&](auto tag) {
    return static_cast<A>(widen(*element<const typename decltype(tag)::Type>(logits, row, column)));
  });
  if (is_identity(pass.transform)) return {x, A(1)};
  const A bias = pass.transform.bias ? static_cast<const A*>(pass.transform.bias)[column] : A(0);
  return transform<typename ScalarOf<A>::V>(pass.transform, x, bias);
}

template <class V>
void gather(const Pass& pass, const Tile& logits, int rows, const TargetIds& ids, double* z) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < ids.k; ++i) {
      z[r * ids.k + i] = logit_at<typename V::T>(pass, logits, r, ids.id[r * ids.k + i]).z;
    }
  }
}

// Rows of adjacent classes that are widened, padded, or copied because their place is taken, get their maxima on the way.
// False: not such rows.
template <class O>
inline bool stage_with_max(const Pass& pass, const Tile& logits, int rows, int64_t block, bool copy, Ahead& ahead,
                           Scratch& scratch, typename O::T* max) {
  using A = typename O::T;
  if (O::kRows > 1 || logits.class_step != 1 || !is_identity(pass.transform)) return false;
  return with_storage(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (O::kRows == 1 && kNative<typename O::V, T>) {
      if (sizeof(T) == sizeof(A) && rows == 1 && !copy) return false;
      const int n = block_length(pass.classes, block);
      for (int r = 0; r < rows; ++r) {
        widen_with_max<O>(element<const T>(logits, r, block * kBlock), n, ahead,
                          static_cast<A*>(scratch.logits) + r * O::padded(n), max + r);
      }
      return true;
    }
    return false;
  });
}

template <class O>
void scan_panels(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end,
                 const TargetIds& ids, const Scanned& out, Scratch& scratch) {
  using A = typename O::T;
  const int64_t blocks = block_count(pass);
  const auto sums_of = pass.want & kWantSumSq     ? &exp_sums<O, true, true, false>
                       : pass.want & kWantEntropy ? &exp_sums<O, true, false, false>
                       : out.powers               ? &exp_sums<O, false, false, true>
                                                  : &exp_sums<O, false, false, false>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock;
    const int n = block_length(pass.classes, block);
    A max_of_row[kTileRows];
    Ahead ahead(logits, rows, block);
    const bool copy = out.powers == logits.data;
    const bool max_known = stage_with_max<O>(pass, logits, rows, block, copy, ahead, scratch, max_of_row);
    const Staged<A> staged = max_known ? Staged<A>{static_cast<A*>(scratch.logits), O::padded(n) * O::kRows}
                                       : stage_logits<O>(pass, logits, rows, block, scratch);
    const A* weight = (pass.want & kWantWeighted) || soft.data ? stage_weight<A>(pass, block, scratch) : nullptr;
    A* q = soft.data ? static_cast<A*>(scratch.soft) : nullptr;
    if (q) load_tile<O>(soft, first, n, rows, A(0), q, staged.panel_size);
    for (int p = 0; p < panel_count<O>(rows); ++p) {
      const A* z = staged.z + p * staged.panel_size;
      A max[O::kRows], ref[O::kRows];
      if (max_known) {
        max[0] = max_of_row[p];
      } else {
        row_max<O>(z, n, ahead, max);
      }
      for (int r = 0; r < O::kRows; ++r) ref[r] = finite_reference(max[r]);
      PanelSums<O> sums;
      A* powers = out.powers ? powers_of<O>(pass, out, rows, block) + p * staged.panel_size : nullptr;
      sums_of(z, n, ref, ahead, powers, sums);

      const auto write = [&](PartialField field, const A* numbers) {
        double* row = out.partials.row(block, field) + p * O::kRows;
        for (int r = 0; r < O::kRows; ++r) row[r] = numbers[r];
      };
      write(kMax, max);
      write(kSum, sums.sum);
      double* rest = out.partials.row(block, kRest) + p * O::kRows;
      for (int r = 0; r < O::kRows; ++r) rest[r] = is_confident(sums.sum[r]) ? sums.others[r] : sums.sum[r] - 1.0;
      if (pass.want & (kWantEntropy | kWantSumSq)) write(kSumX, sums.sum_x);
      if (pass.want & kWantSumSq) write(kSumSq, sums.sum_sq);
      A weighted[O::kRows], total[O::kRows];
      if (pass.want & kWantWeighted) {
        weighted_sums<O, false>(z, weight, nullptr, n, ref, weighted, total);
        write(kWeighted, weighted);
        write(kWeight, total);
      }
      if (q) {
        weighted_sums<O, true>(z, weight, q + p * staged.panel_size, n, ref, weighted, total);
        write(kSoft, weighted);
        write(kSoftWeight, total);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = r * ids.k; i < (r + 1) * ids.k; ++i) {
        const int64_t at = ids.id[i] - first;
        if (at >= 0 && at < n) out.target_z[i] = staged.z[place<O>(r, at, staged.panel_size)];
      }
      if (!out.ranks) continue;
      const A* row = staged.z + r * staged.panel_size;
      if (O::kRows > 1) {
        A* room = static_cast<A*>(scratch.derivative);
        for (int j = 0; j < n; ++j) room[j] = staged.z[place<O>(r, j, staged.panel_size)];
        row = room;
      }
      for (int i = 0; i < ids.k; ++i) {
        const int id = r * ids.k + i;
        out.ranks[(r * blocks + block) * ids.k + i] =
            count_before<typename O::V>(row, first, n, ids.id[id], static_cast<A>(out.target_z[id]));
      }
    }
  }
}

template <class V>
void scan(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end, const TargetIds& ids,
          const Scanned& out, Scratch& scratch) {
  with_panels<V>(logits, rows, [&](auto tag) {
    scan_panels<typename decltype(tag)::Type>(pass, logits, soft, rows, begin, end, ids, out, scratch);
  });
}

template <class V>
void finish(const Pass& pass, const Tile& logits, int rows, const Partials& partials, RowStats* stats, Scratch& scratch) {
  using A = typename V::T;
  finish_rows<typename V::Wide>(pass, partials, rows, stats);
  for (int r = 0; r < rows && (pass.want & kWantArgmax); ++r) {
    RowStats& s = stats[r];
    const int64_t top = s.argmax;  // the block
    s.argmax = -1;
    if (s.rest != s.rest) continue;
    Tile row = logits;
    with_storage(logits.dtype,
                 [&](auto tag) { row.data = reinterpret_cast<char*>(element<typename decltype(tag)::Type>(logits, r, 0)); });
    const A* z = stage_logits<Along<V>>(pass, row, 1, top, scratch).z;
    s.argmax = top * kBlock + first_of_max<V>(z, block_length(pass.classes, top), static_cast<A>(s.max));
  }
}

template <class V>
void gradient(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end,
              const GradientRow* coefficients, const TargetIds& ids, const double* g, double* corrected, const Scanned& scanned,
              const Tile& grad, Scratch& scratch) {
  with_panels<V>(logits, rows, [&](auto tag) {
    gradient_panels<typename decltype(tag)::Type>(pass, logits, soft, rows, begin, end, coefficients, ids, g, corrected,
                                                  scanned, grad, scratch);
  });
}

template <class V>
void soft_gradient(const Pass& pass, const Tile& logits, int rows, int64_t begin, int64_t end, const RowStats* stats,
                   const double* scale, const Tile& out, Scratch& scratch) {
  with_panels<V>(logits, rows, [&](auto tag) {
    soft_gradient_panels<typename decltype(tag)::Type>(pass, logits, rows, begin, end, stats, scale, out, scratch);
  });
}

template <class V>
int sample(const Pass& pass, const Tile& logits, const Tile& soft, int64_t block, const GradientRow& coefficients,
           const TargetIds& ids, const double* g, const Scanned& scanned, const Sampling& sampling, void* kept,
           Scratch& scratch) {
  using A = typename V::T;
  const int64_t first = block * kBlock;
  const int n = block_length(pass.classes, block);
  const int64_t target = ids.k ? *ids.id : -1;
  double corrected = 0.0;
  const auto keep = [&](auto at, A of_target) {
    return keep_at_random<V>(at, first, n, target, of_target, sampling.threshold, sampling.key, static_cast<Kept<A>*>(kept));
  };
  if (scanned.powers && is_plain<A>(pass, soft, coefficients)) {  // which `gradient` would do likewise, by way of a buffer
    using O = Along<V>;
    GradientTerms<O> terms{};
    set_terms<O>(pass, soft, &coefficients, 1, block, terms);
    const GradientFormula<O, true> formula{terms};
    const A* powers = powers_of<O>(pass, scanned, 1, block);
    if (target >= first && target < first + n) {
      TargetGradients<typename V::Wide> of_target;
      of_target.add(coefficients, *scanned.target_z, 1.0, pass.transform.inv_temperature, *g, &corrected);
      of_target.flush();
    }
    // Meanwhile the memory is idle: the logits of the next row come into L2.
    const char* next = with_storage(logits.dtype, [&](auto tag) {
      return reinterpret_cast<char*>(element<typename decltype(tag)::Type>(logits, 1, first));
    });
    const int itemsize = with_storage(logits.dtype, [](auto tag) { return int(sizeof(typename decltype(tag)::Type)); });
    const auto at = [&](int i) {
      __builtin_prefetch(next + i * itemsize, 0, 2);
      return formula.of_power(V::load(powers + i));
    };
    return keep(at, static_cast<A>(corrected));
  }
  A* row = static_cast<A*>(scratch.gradient);
  Tile grad;  // whose element `first` is the start of the buffer
  grad.data = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(row) - static_cast<uintptr_t>(first) * sizeof(A));
  grad.dtype = sizeof(A) == 8 ? kF64 : kF32;
  gradient<V>(pass, logits, soft, 1, block, block + 1, &coefficients, ids, g, &corrected, scanned, grad, scratch);
  return keep([&](int i) { return V::load(row + i); }, static_cast<A>(corrected));
}

template <class V>
constexpr RowKernels row_kernels() {
  return {&gather<V>,        &scan<V>,  &finish<V>,        &gradient<V>,        &sample<V>,
          &weighted_rows<V>, &round<V>, &soft_gradient<V>, &ordered_product<V>, &product<V>};
}

template <class Isa>
constexpr Kernels make_kernels() {
  return {Isa::kName, row_kernels<typename Isa::F32>(), row_kernels<typename Isa::F64>()};
}

}  // namespace
}  // namespace fastloss
