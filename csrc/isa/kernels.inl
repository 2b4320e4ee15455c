// SPDX-License-Identifier: Apache-2.0
// The functions of kernels.hpp for one vector type: tiles are cut into blocks, blocks staged, rows handed to row.hpp.
#include "../combine.hpp"
#include "../row.hpp"
#include "../sampled.hpp"

namespace fastloss {
namespace {

inline int64_t block_count(const Pass& pass) { return (pass.classes + kBlock - 1) / kBlock; }

// While a block of one row is computed, the next one is fetched: so many bytes for each kLanes classes, from there.
inline int bytes_ahead(const Tile& logits, int rows) {
  if (rows > 1 || logits.class_step != 1) return 0;
  return kLanes * with_storage(logits.dtype, [](auto tag) { return int(sizeof(typename decltype(tag)::Type)); });
}
inline const char* next_block(const Tile& logits, int64_t block, int ahead_bytes) {
  return ahead_bytes ? logits.data + (block + 1) * (kBlock / kLanes) * ahead_bytes : nullptr;
}

// The reference of a block of only -inf is 0, so that -inf - ref stays -inf.
template <class A>
inline A finite_reference(A max) {
  return max == -static_cast<A>(__builtin_huge_val()) ? A(0) : max;
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

// The first place of the maximum of a padded row.
template <class V>
inline int index_of_max(const typename V::T* z, int n, typename V::T max) {
  for (int i = 0; i < n; i += V::kWidth) {
    if (V::count_greater(V::set(max), V::load(z + i)) == V::kWidth) continue;
    for (int j = i; j < i + V::kWidth && j < n; ++j) {
      if (z[j] == max) return j;
    }
  }
  return -1;
}

// sum exp(z - max) without the first class of the maximal logit: what its 1 would round away. `room` takes the row.
template <class V>
inline double sum_without_max(const typename V::T* z, int n, typename V::T max, typename V::T* room) {
  __builtin_memcpy(room, z, padded(n) * sizeof *z);
  room[index_of_max<V>(z, n, max)] = -static_cast<typename V::T>(__builtin_huge_val());
  Partial without = {};
  exp_sums<V, false, false>(room, n, max, nullptr, 0, without);
  return without.sum;
}

template <class V>
void scan(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end, Partial* partials,
          const TargetIds& ids, double* target_z, int64_t* ranks, Scratch& scratch) {
  using A = typename V::T;
  const int64_t blocks = block_count(pass);
  const auto sums = pass.want & kWantSumSq     ? &exp_sums<V, true, true>
                    : pass.want & kWantEntropy ? &exp_sums<V, true, false>
                                               : &exp_sums<V, false, false>;
  const int ahead_bytes = bytes_ahead(logits, rows);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock;
    const int n = block_length(pass.classes, block);
    const int whole = padded(n);
    const Staged<A> staged = stage_logits<V>(pass, logits, rows, block, scratch);
    const A* weight = pass.want & kWantWeighted ? stage_weight<A>(pass, block, scratch) : nullptr;
    A* q = soft.data ? static_cast<A*>(scratch.soft) : nullptr;
    if (q) load_tile<V>(soft, first, n, rows, A(0), q, whole);
    for (int r = 0; r < rows; ++r) {
      const A* z = staged.z + r * staged.stride;
      Partial& out = partials[r * blocks + block];
      out = {};
      const A max = row_max<V>(z, n);
      const A ref = finite_reference(max);
      out.max = max;
      sums(z, n, ref, next_block(logits, block, ahead_bytes), ahead_bytes, out);
      // A class that holds more than half of the block, perhaps of the row.
      const bool confident = out.sum >= 1.0 && out.sum < 2.0;
      out.rest = confident ? sum_without_max<V>(z, n, max, static_cast<A*>(scratch.derivative)) : out.sum - 1.0;
      if (weight) weighted_sums<V, false>(z, weight, nullptr, n, ref, out.weighted, out.weight);
      if (q) {
        const A* w = weight ? weight : stage_weight<A>(pass, block, scratch);
        weighted_sums<V, true>(z, w, q + r * whole, n, ref, out.soft, out.soft_weight);
      }
      for (int i = 0; i < ids.k; ++i) {
        const int64_t at = ids.id[r * ids.k + i] - first;
        if (at >= 0 && at < n) target_z[r * ids.k + i] = z[at];
      }
      if (ranks) {
        for (int i = 0; i < ids.k; ++i) {
          ranks[(r * blocks + block) * ids.k + i] =
              count_before<V>(z, first, n, ids.id[r * ids.k + i], static_cast<A>(target_z[r * ids.k + i]));
        }
      }
    }
  }
}

template <class V>
void finish(const Pass& pass, const Tile& logits, int rows, const Partial* partials, RowStats* stats, Scratch& scratch) {
  using A = typename V::T;
  const int64_t blocks = block_count(pass);
  for (int r = 0; r < rows; ++r) {
    const Partial* parts = partials + r * blocks;
    int64_t top = 0;
    for (int64_t b = 1; b < blocks; ++b) {
      if (parts[b].max > parts[top].max) top = b;
    }
    RowStats s = {};
    s.max = parts[top].max;
    s.argmax = -1;
    double others = 0, sum_x = 0, sum_sq = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const Partial& part = parts[b];
      const double shift = finite_reference(part.max) - s.max;
      const double scale = part.max == s.max ? 1.0 : part.sum == 0.0 ? 0.0 : exp_nonpositive(part.max - s.max);
      if (b != top) others += part.sum * scale;
      sum_x += (part.sum_x + (scale == 0.0 ? 0.0 : shift * part.sum)) * scale;
      sum_sq += part.sum_sq * scale * scale;
      if (part.weight != 0.0) s.weighted += part.weighted + shift * part.weight;
      if (part.soft_weight != 0.0) s.soft += part.soft + shift * part.soft_weight;
      s.weight += part.weight;
      s.soft_weight += part.soft_weight;
    }
    const double sum = parts[top].sum + others;
    const bool valid = sum >= 1.0;  // neither NaN nor a row of only -inf
    s.rest = valid ? parts[top].rest + others : __builtin_nan("");
    if (valid && (pass.want & kWantArgmax)) {
      Tile row = logits;
      with_storage(logits.dtype,
                   [&](auto tag) { row.data = reinterpret_cast<char*>(element<typename decltype(tag)::Type>(logits, r, 0)); });
      const A* z = stage_logits<V>(pass, row, 1, top, scratch).z;
      s.argmax = top * kBlock + index_of_max<V>(z, block_length(pass.classes, top), static_cast<A>(s.max));
    }
    s.log_sum = log1p_nonnegative(s.rest);
    const double inv_sum = 1.0 / (1.0 + s.rest);
    s.mean_x = sum_x * inv_sum;
    s.sum_sq = sum_sq * inv_sum * inv_sum;
    stats[r] = s;
  }
}

// Ids that occur again in a row add up at their first place.
inline bool occurs_before(const int64_t* id, int i) {
  for (int j = 0; j < i; ++j) {
    if (id[j] == id[i]) return true;
  }
  return false;
}

// The value at target `i` of a row, in double and rounded once: p - 1 of a confident row would cancel, so there 1 - p is made
// from `rest`. `z` is its logit, `slope` dz/dx there.
inline double gradient_at_target(const GradientRow& c, double z, double weight, double slope, const int64_t* id,
                                 const double* g, int k, int i) {
  const double x = clamp_exponent<ScalarF64>(z - finite_reference(c.max));
  const double e = exp_clamped<ScalarF64>(x);
  const double p = e / (1.0 + c.rest);
  double one_hot = 0.0;
  for (int j = i; j < k; ++j) {
    if (id[j] == id[i]) one_hot += g[j];
  }
  const double one_minus_p = (c.rest + (1.0 - e)) / (1.0 + c.rest);
  const double hit = p > 0.5 ? (c.a - one_hot) - c.a * one_minus_p : c.a * p - one_hot;
  return (hit + p * (c.b * x + c.c * p) + weight * c.d) * slope;
}

template <class V>
void gradient(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end,
              const GradientRow* coefficients, const TargetIds& ids, const double* g, double* corrected, const Tile& grad,
              Scratch& scratch) {
  using A = typename V::T;
  const bool softcapped = pass.transform.softcap != 0.0;
  const int ahead_bytes = bytes_ahead(logits, rows);
  // float32 and float64 go straight to memory; what needs rounding or turning goes by way of the staged rows.
  const bool direct = grad.class_step == 1 && grad.dtype == (sizeof(A) == 8 ? kF64 : kF32);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock;
    const int n = block_length(pass.classes, block);
    const int whole = padded(n);
    if (direct && rows == 1 && coefficients[0].zero) {
      __builtin_memset(element<A>(grad, 0, first), 0, n * sizeof(A));
      continue;
    }
    const Staged<A> staged =
        stage_logits<V>(pass, logits, rows, block, scratch, /*want_derivative=*/true, /*may_alias=*/direct);
    const A* weight = pass.weight ? stage_weight<A>(pass, block, scratch) : nullptr;
    A* q = soft.data ? static_cast<A*>(scratch.soft) : nullptr;
    if (q) load_tile<V>(soft, first, n, rows, A(0), q, whole);
    for (int r = 0; r < rows; ++r) {
      const GradientRow& c = coefficients[r];
      const double slope = softcapped ? 1.0 : pass.transform.inv_temperature;
      GradientTerms<A> terms;
      terms.ref = finite_reference(static_cast<A>(c.max));
      terms.inv_sum = static_cast<A>(1.0 / (1.0 + c.rest));
      terms.a = static_cast<A>(c.a * slope);
      terms.b = static_cast<A>(c.b * slope);
      terms.c = static_cast<A>(c.c * slope);
      terms.d = static_cast<A>(c.d * slope);
      terms.e = static_cast<A>(c.e * slope);
      terms.weight = c.d != 0.0 || q ? weight : nullptr;
      terms.soft = q ? q + r * whole : nullptr;
      terms.derivative = softcapped ? static_cast<const A*>(scratch.derivative) + r * staged.stride : nullptr;
      const A* z = staged.z + r * staged.stride;
      A* out = direct ? element<A>(grad, r, first) : const_cast<A*>(z);
      const bool stream = direct && pass.stream && reinterpret_cast<uintptr_t>(out) % sizeof(typename V::Reg) == 0;
      const auto write = terms.plain() ? stream ? &gradient_row<V, true, true> : &gradient_row<V, true, false>
                         : stream      ? &gradient_row<V, false, true>
                                       : &gradient_row<V, false, false>;
      if (c.zero) {
        __builtin_memset(out, 0, n * sizeof(A));
        continue;
      }
      const int64_t* id = ids.id + r * ids.k;
      const auto for_targets = [&](auto visit) {
        for (int i = 0; i < ids.k; ++i) {
          if (id[i] >= first && id[i] < first + n && !occurs_before(id, i)) visit(i, id[i] - first);
        }
      };
      // The targets first: `out` may be z.
      for_targets([&](int i, int64_t at) {
        const double w = weight ? weight[at] : 1.0;
        const double dz_dx = softcapped ? terms.derivative[at] : pass.transform.inv_temperature;
        corrected[r * ids.k + i] = gradient_at_target(c, z[at], w, dz_dx, id, g + r * ids.k, ids.k, i);
      });
      write(terms, z, n, next_block(logits, block, ahead_bytes), ahead_bytes, out);
      for_targets([&](int i, int64_t at) { out[at] = static_cast<A>(corrected[r * ids.k + i]); });
    }
    if (!direct) store_tile<V>(staged.z, staged.stride, first, n, rows, grad, pass.stream);
  }
  if (pass.stream) V::fence();
}

template <class V>
void soft_gradient(const Pass& pass, const Tile& logits, int rows, int64_t begin, int64_t end, const RowStats* stats,
                   const double* scale, const Tile& out, Scratch& scratch) {
  using A = typename V::T;
  for (int64_t block = begin; block < end; ++block) {
    const int n = block_length(pass.classes, block);
    const Staged<A> staged = stage_logits<V>(pass, logits, rows, block, scratch, false, /*may_alias=*/false);
    const A* weight = stage_weight<A>(pass, block, scratch);
    for (int r = 0; r < rows; ++r) {
      A* z = const_cast<A*>(staged.z) + r * staged.stride;
      const auto max = V::set(static_cast<A>(stats[r].max));
      const auto log_sum = V::set(static_cast<A>(log1p_nonnegative(stats[r].rest)));
      const auto factor = V::set(static_cast<A>(scale[r]));
      for (int i = 0; i < padded(n); i += V::kWidth) {
        const auto gap = V::sub(log_sum, V::sub(V::load(z + i), max));
        V::store(z + i, V::mul(V::mul(factor, V::load(weight + i)), gap));
      }
    }
    store_tile<V>(staged.z, staged.stride, block * kBlock, n, rows, out);
  }
}

template <class V>
int sample(const Pass& pass, const Tile& logits, const Tile& soft, int64_t block, const GradientRow& coefficients,
           const TargetIds& ids, const double* g, const Sampling& sampling, void* kept, Scratch& scratch) {
  using A = typename V::T;
  const int64_t first = block * kBlock;
  const int n = block_length(pass.classes, block);
  A* row = static_cast<A*>(scratch.gradient);
  Tile grad;  // whose element `first` is the start of the buffer
  grad.data = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(row) - static_cast<uintptr_t>(first) * sizeof(A));
  grad.dtype = sizeof(A) == 8 ? kF64 : kF32;
  double corrected;
  gradient<V>(pass, logits, soft, 1, block, block + 1, &coefficients, ids, g, &corrected, grad, scratch);
  for (int j = n; j < padded(n); ++j) row[j] = A(0);
  return keep_at_random<V>(row, first, n, ids.k ? *ids.id : -1, sampling.threshold, sampling.key, static_cast<Kept<A>*>(kept));
}

template <class V>
constexpr RowKernels row_kernels() {
  return {&gather<V>, &scan<V>, &finish<V>, &gradient<V>, &sample<V>, &weighted_rows<V>, &soft_gradient<V>};
}

template <class Isa>
constexpr Kernels make_kernels() {
  return {Isa::kName, row_kernels<typename Isa::F32>(), row_kernels<typename Isa::F64>()};
}

}  // namespace
}  // namespace fastloss
