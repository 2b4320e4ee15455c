// SPDX-License-Identifier: Apache-2.0
// The gradient of a tile: its panels, then its targets, which are made in double.
#pragma once

#include "targets.hpp"

namespace fastloss {
namespace {

// grad_j = p_j (a + b x_j + c p_j) + w_j (d + e q_j), times dz/dx. The plain form has b = c = e = 0 and no weights.
template <class O>
struct GradientTerms {
  using T = typename O::T;
  // Of each row. Which form a row takes is its own affair, whatever its neighbours in the panel take.
  T ref[O::kRows] = {}, inv_sum[O::kRows] = {}, a[O::kRows] = {}, b[O::kRows] = {}, c[O::kRows] = {}, d[O::kRows] = {},
    e[O::kRows] = {}, plain[O::kRows] = {};
  const T* weight;      // null: ones
  const T* soft;        // null: no soft targets
  const T* derivative;  // null: already in the coefficients
};

template <class O, bool kPlain>
struct GradientFormula {
  using V = typename O::V;
  using Reg = typename V::Reg;
  const GradientTerms<O>& t;
  const Reg ref = O::per_row(t.ref), inv_sum = O::per_row(t.inv_sum), a = O::per_row(t.a), b = O::per_row(t.b),
            c = O::per_row(t.c), d = O::per_row(t.d), e = O::per_row(t.e), plain = O::per_row(t.plain),
            plain_a = V::mul(a, inv_sum);

  FASTLOSS_HD Reg of_power(Reg power) const { return V::fma(power, plain_a, d); }

  template <class T>
  FASTLOSS_HD Reg at(const T* z, int i) const {
    const auto x = clamp_exponent<V>(V::sub(load_at<O>(z, i), ref));
    return of_power(exp_clamped<V>(x), x, i);
  }

  // Of power = exp(x), in the classes from i on.
  FASTLOSS_HD Reg of_power(Reg power, Reg x, int i) const {
    const auto plain_g = of_power(power);
    if constexpr (kPlain) return plain_g;
    const auto p = V::mul(power, inv_sum);
    auto g = V::mul(p, V::fma(c, p, V::fma(b, x, a)));
    auto share = d;
    if (t.soft) share = V::fma(e, load_at<O>(t.soft, i), share);
    g = t.weight ? V::fma(O::per_class(t.weight + i), share, g) : V::add(g, share);
    if (t.derivative) g = V::mul(g, load_at<O>(t.derivative, i));
    return O::kRows == 1 ? g : V::select_greater(plain, V::set(0), plain_g, g);
  }
};

// What the gradient of a panel is made from.
enum class From {
  kLogits,
  kLogitsPlain,  // rows of the plain form alone
  kPowers,       // the same, exp(z - ref) in place of z
};

template <From kFrom>
struct FromTag {
  static constexpr From value = kFrom;
};

// The gradient of one panel of n classes; `out` may be `in` itself. Nothing behind out + n is touched. With kStream the
// stores go past the caches, and `out` is aligned to what one register fills.
template <class O, From kFrom, bool kStream, class In, class Out>
inline void write_panel(const GradientTerms<O>& terms, const In* in, int n, Ahead& ahead, Out* out) {
  using V = typename O::V;
  const GradientFormula<O, kFrom != From::kLogits> formula{terms};
  const auto write = [&](int i, typename V::Reg g) {
    if constexpr (kStream) {
      V::stream(out + i * O::kRows, g);
    } else {
      V::store(out + i * O::kRows, g);
    }
  };
  const auto fetch = [&] { ahead.fetch<typename O::T>(Ahead::kShares); };
  const int whole = n / O::kClasses * O::kClasses;
  if constexpr (kFrom == From::kPowers) {
    for_registers<O>(whole, fetch, [&](int i, int) { write(i, formula.of_power(load_at<O>(in, i))); });
  } else {
    const auto begin = [&](int i) { return begin_exp<O>(in, i, formula.ref); };
    for_registers_in_flight<O>(whole, fetch, begin, [&](int i, int, const BegunExp<V>& begun) {
      write(i, formula.of_power(exp_shifted<V>(begun.x, begun.shifted), begun.x, i));
    });
  }
  if (whole == n) return;
  typename V::T rest[V::kWidth];
  if constexpr (kFrom == From::kPowers) {
    V::store(rest, formula.of_power(load_at<O>(in, whole)));
  } else {
    V::store(rest, formula.at(in, whole));
  }
  for (int j = 0; whole + j < n; ++j) out[whole + j] = narrow<Out>(rest[j]);
}

// `slope` is dz/dx, where that is the same for all classes.
template <class O>
FASTLOSS_HD inline void set_row(GradientTerms<O>& terms, int r, const GradientRow& c, double slope) {
  using A = typename O::T;
  terms.ref[r] = finite_reference(static_cast<A>(c.max));
  terms.inv_sum[r] = static_cast<A>(1.0 / (1.0 + c.rest));
  terms.a[r] = static_cast<A>(c.a * slope);
  terms.b[r] = static_cast<A>(c.b * slope);
  terms.c[r] = static_cast<A>(c.c * slope);
  terms.d[r] = static_cast<A>(c.d * slope);
  terms.e[r] = static_cast<A>(c.e * slope);
}

template <class A>
inline bool is_plain(const Pass& pass, const Tile& soft, const GradientRow& c) {
  const bool weighted = pass.weight && c.d != 0.0;
  return static_cast<A>(c.b) == 0 && static_cast<A>(c.c) == 0 && !weighted && !soft.data && pass.transform.softcap == 0.0;
}

// The terms of the rows of one panel of a block.
template <class O>
inline void set_terms(const Pass& pass, const Tile& soft, const GradientRow* rows, int count, int64_t block,
                      GradientTerms<O>& terms) {
  using A = typename O::T;
  const double slope = terms.derivative ? 1.0 : pass.transform.inv_temperature;
  for (int r = 0; r < count; ++r) {
    const GradientRow& c = rows[r];
    terms.plain[r] = c.zero || is_plain<A>(pass, soft, c);
    if (c.zero) continue;
    set_row(terms, r, c, slope);
    const double block_max = c.block_max[block];
    if (block_max == c.max) continue;
    const double shift = clamp_exponent<ScalarF64>(block_max - c.max);
    terms.ref[r] = finite_reference(static_cast<A>(block_max));
    terms.inv_sum[r] = static_cast<A>(exp_clamped<ScalarF64>(shift) / (1.0 + c.rest));
    terms.a[r] = static_cast<A>((c.a + c.b * shift) * slope);
  }
}

template <class O>
void gradient_panels(const Pass& pass, const Tile& logits, const Tile& soft, int rows, int64_t begin, int64_t end,
                     const GradientRow* coefficients, const TargetIds& ids, const double* g, double* corrected,
                     const Scanned& scanned, const Tile& grad, Scratch& scratch) {
  using V = typename O::V;
  using A = typename V::T;
  const bool softcapped = pass.transform.softcap != 0.0;
  bool plain = true;
  for (int r = 0; r < rows; ++r) plain &= coefficients[r].zero || is_plain<A>(pass, soft, coefficients[r]);
  // Rows with adjacent classes go straight to memory; what lies across goes by way of the staged panels.
  const bool direct = O::kRows == 1 && grad.class_step == 1 && (sizeof(A) == 8) == (grad.dtype == kF64);
  // Logits that were just read lie in the cache, but for planes, whose lines all fall into the same few sets.
  const bool past_caches = pass.stream && (O::kRows > 1 || grad.data != logits.data);

  const auto write_block = [&](int64_t block, auto storage) {
    using Out = typename decltype(storage)::Type;
    const int64_t first = block * kBlock;
    const int n = block_length(pass.classes, block);
    if (direct && rows == 1 && coefficients[0].zero) {
      __builtin_memset(element<Out>(grad, 0, first), 0, n * sizeof(Out));
      return;
    }
    // Calls visit(r, i, at) for each target of the block.
    const auto for_targets = [&](auto visit) {
      for (int r = 0; r < rows; ++r) {
        const int64_t* id = ids.id + r * ids.k;
        for (int i = 0; i < ids.k && !coefficients[r].zero; ++i) {
          if (id[i] >= first && id[i] < first + n && !occurs_before(id, i)) visit(r, i, id[i] - first);
        }
      }
    };
    // 16-bit logits that are looked at once are read where they lie.
    const bool unstaged =
        plain && !scanned.powers && direct && sizeof(Out) == 2 && logits.dtype == grad.dtype && is_panel(pass, logits, rows, n);
    Staged<A> staged = {nullptr, O::padded(n) * O::kRows};
    if (scanned.powers) {
      staged.z = powers_of<O>(pass, scanned, rows, block);
    } else if (!unstaged) {
      staged = stage_logits<O>(pass, logits, rows, block, scratch, /*want_derivative=*/true, /*may_alias=*/direct);
    }
    const A* weight = pass.weight ? stage_weight<A>(pass, block, scratch) : nullptr;
    A* q = soft.data ? static_cast<A*>(scratch.soft) : nullptr;
    if (q) load_tile<O>(soft, first, n, rows, A(0), q, staged.panel_size);
    const A* derivative = softcapped ? static_cast<const A*>(scratch.derivative) : nullptr;

    // The targets first: the gradient may take the place of the logits.
    TargetGradients<typename V::Wide> targets;
    for_targets([&](int r, int i, int64_t at) {
      const int64_t there = place<O>(r, at, staged.panel_size);
      const double z = scanned.powers ? scanned.target_z[r * ids.k + i]
                       : unstaged     ? widen(*element<const Out>(logits, r, first + at))
                                      : staged.z[there];
      const double slope = softcapped ? derivative[there] : pass.transform.inv_temperature;
      targets.add(coefficients[r], z, weight ? weight[at] : 1.0, slope, one_hot(ids.id + r * ids.k, g + r * ids.k, ids.k, i),
                  corrected + r * ids.k + i);
    });
    targets.flush();

    const auto panel_out = [&](int p) {
      return direct ? element<Out>(grad, p, first) : reinterpret_cast<Out*>(const_cast<A*>(staged.z) + p * staged.panel_size);
    };
    const auto put = [&](int r, int64_t at, double value) {
      panel_out(r / O::kRows)[place<O>(r % O::kRows, at, 0)] = narrow<Out>(value);
    };
    for (int p = 0; p < panel_count<O>(rows); ++p) {
      const int row = p * O::kRows;
      const int count = rows - row < O::kRows ? rows - row : O::kRows;
      Out* out = panel_out(p);
      const A* z = staged.z + p * staged.panel_size;
      GradientTerms<O> terms;
      terms.weight = weight;
      terms.soft = q ? q + p * staged.panel_size : nullptr;
      terms.derivative = derivative ? derivative + p * staged.panel_size : nullptr;
      set_terms<O>(pass, soft, coefficients + row, count, block, terms);
      const bool stream = direct && past_caches && reinterpret_cast<uintptr_t>(out) % (V::kWidth * sizeof(Out)) == 0;
      const auto write = [&](auto from, const auto* in) {
        constexpr From kFrom = decltype(from)::value;
        Ahead ahead = scanned.powers ? Ahead() : Ahead(logits, rows, block);
        if (stream) {
          write_panel<O, kFrom, true>(terms, in, n, ahead, out);
        } else {
          write_panel<O, kFrom, false>(terms, in, n, ahead, out);
        }
      };
      if (scanned.powers) {
        write(FromTag<From::kPowers>{}, z);
      } else if (unstaged) {
        write(FromTag<From::kLogitsPlain>{}, element<const Out>(logits, 0, first));
      } else if (plain) {
        write(FromTag<From::kLogitsPlain>{}, z);
      } else {
        write(FromTag<From::kLogits>{}, z);
      }
      for (int r = 0; r < count; ++r) {
        for (int j = 0; j < n && coefficients[row + r].zero; ++j) put(row + r, j, 0.0);
      }
    }
    for_targets([&](int r, int i, int64_t at) { put(r, at, corrected[r * ids.k + i]); });
    if (!direct) store_tile<O>(staged.z, staged.panel_size, first, n, rows, grad, past_caches);
  };
  with_storage(direct           ? grad.dtype
               : sizeof(A) == 8 ? kF64
                                : kF32,
               [&](auto storage) {
                 if constexpr (kNative<V, typename decltype(storage)::Type>) {
                   for (int64_t block = begin; block < end; ++block) write_block(block, storage);
                 }
               });
  if (pass.stream) V::fence();
}

// scale w_j (L - z_j): the gradient of a loss by its soft target.
template <class V>
FASTLOSS_HD inline typename V::Reg soft_gradient_at(typename V::Reg z, typename V::Reg w, typename V::Reg max,
                                                    typename V::Reg log_sum, typename V::Reg scale) {
  return V::mul(V::mul(scale, w), V::sub(log_sum, V::sub(z, max)));
}

template <class O>
void soft_gradient_panels(const Pass& pass, const Tile& logits, int rows, int64_t begin, int64_t end, const RowStats* stats,
                          const double* scale, const Tile& out, Scratch& scratch) {
  using V = typename O::V;
  using A = typename V::T;
  for (int64_t block = begin; block < end; ++block) {
    const int n = block_length(pass.classes, block);
    const Staged<A> staged = stage_logits<O>(pass, logits, rows, block, scratch, false, /*may_alias=*/false);
    const A* weight = stage_weight<A>(pass, block, scratch);
    for (int p = 0; p < panel_count<O>(rows); ++p) {
      A* z = const_cast<A*>(staged.z) + p * staged.panel_size;
      A max[O::kRows] = {}, log_sum[O::kRows] = {}, factor[O::kRows] = {};
      for (int r = 0; r < O::kRows && p * O::kRows + r < rows; ++r) {
        const int row = p * O::kRows + r;
        max[r] = static_cast<A>(stats[row].max);
        log_sum[r] = static_cast<A>(log1p_nonnegative<ScalarF64>(stats[row].rest));
        factor[r] = static_cast<A>(scale[row]);
      }
      const auto top = O::per_row(max), log_sums = O::per_row(log_sum), factors = O::per_row(factor);
      for (int j = 0; j < n; j += O::kClasses) {
        const auto w = O::per_class(weight + j);
        V::store(z + j * O::kRows, soft_gradient_at<V>(load_at<O>(z, j), w, top, log_sums, factors));
      }
    }
    store_tile<O>(staged.z, staged.panel_size, block * kBlock, n, rows, out);
  }
}

}  // namespace
}  // namespace fastloss
