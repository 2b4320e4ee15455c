// SPDX-License-Identifier: Apache-2.0
// Every compiled instruction set against the scalar reference, bit for bit: statistics, gradients, every dtype, lengths around
// the lane count, strided tiles, transforms, -inf and NaN. Runs without Python, so also under an emulator.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels.hpp"
#include "simd/scalar.hpp"

using namespace fastloss;

namespace {

struct Buffers {
  std::vector<double> memory = std::vector<double>(5 * kTileElements);
  Scratch scratch{&memory[0], &memory[kTileElements], &memory[2 * kTileElements], &memory[3 * kTileElements],
                  &memory[4 * kTileElements]};
};

template <class T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  std::vector<char> out(values.size() * sizeof(T));
  memcpy(out.data(), values.data(), out.size());
  return out;
}

std::vector<char> stored(const std::vector<double>& x, Dtype dtype) {
  std::vector<float> f32(x.begin(), x.end());
  std::vector<F16> f16;
  std::vector<BF16> bf16;
  for (const double v : x) {
    f16.push_back(to_f16(static_cast<float>(v)));
    bf16.push_back(to_bf16(static_cast<float>(v)));
  }
  if (dtype == kF64) return bytes_of(x);
  if (dtype == kF16) return bytes_of(f16);
  return dtype == kBF16 ? bytes_of(bf16) : bytes_of(f32);
}

struct Case {
  Dtype dtype;
  int64_t classes;
  int rows;  // more than one: the rows, not the classes, lie side by side
  double softcap, temperature;
  bool bias, weight;
  int kind;  // 0 random, 1 confident, 2 offset, 3 with -inf, 4 with NaN
};

struct Outcome {
  std::vector<double> z, partials;
  std::vector<RowStats> stats;
  std::vector<int64_t> ranks;
  std::vector<char> gradient, soft_gradient, combined, rounded, product, sums[2];
  // The same, from logits, from the exponentials of a scan, and from those where they took the place of the logits.
  std::vector<char> plain_gradient, gradient_of_powers, gradient_in_place;
  std::vector<double> sampled;  // columns and values in turn
};

bool same(const void* a, const void* b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

// Doubles are equal when their bits are, or when both are NaN.
bool same_doubles(const void* a, const void* b, size_t bytes) {
  for (size_t i = 0; i < bytes / 8; ++i) {
    double x, y;
    memcpy(&x, static_cast<const char*>(a) + 8 * i, 8);
    memcpy(&y, static_cast<const char*>(b) + 8 * i, 8);
    if (!same(&x, &y, 8) && !(isnan(x) && isnan(y))) return false;
  }
  return true;
}

double value(const std::vector<char>& data, Dtype dtype, size_t i) {
  if (dtype == kF64) return reinterpret_cast<const double*>(data.data())[i];
  if (dtype == kF16) return widen(reinterpret_cast<const F16*>(data.data())[i]);
  if (dtype == kBF16) return widen(reinterpret_cast<const BF16*>(data.data())[i]);
  return reinterpret_cast<const float*>(data.data())[i];
}

bool same_numbers(const std::vector<char>& a, const std::vector<char>& b, Dtype dtype) {
  const size_t size = dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2;
  for (size_t i = 0; i < a.size() / size; ++i) {
    if (same(&a[i * size], &b[i * size], size)) continue;
    if (!isnan(value(a, dtype, i)) || !isnan(value(b, dtype, i))) return false;
  }
  return true;
}

Outcome run(const Kernels& kernels, const Case& c) {
  std::mt19937_64 random(c.classes * 31 + c.rows * 7 + c.kind);
  std::normal_distribution<double> normal;
  const size_t size = static_cast<size_t>(c.classes) * c.rows;
  std::vector<double> x(size), q(size), bias(c.classes), weight(c.classes);
  for (double& v : x) v = 3 * normal(random) + (c.kind == 2 ? 1e4 : 0);
  for (double& v : q) v = fabs(normal(random)) / static_cast<double>(c.classes);
  for (double& v : bias) v = normal(random);
  for (double& v : weight) v = fabs(normal(random));
  if (c.kind == 1) x[size / 2] += 40;
  if (c.kind == 3) {
    for (size_t i = 0; i < size; i += 3) x[i] = -INFINITY;
  }
  if (c.kind == 4) x[size - 1] = NAN;
  const bool wide = c.dtype == kF64;
  std::vector<char> logits = stored(x, c.dtype), soft = stored(q, c.dtype);
  const std::vector<char> bias_bytes = stored(bias, wide ? kF64 : kF32), weight_bytes = stored(weight, wide ? kF64 : kF32);

  Pass pass;
  pass.classes = c.classes;
  pass.transform = {1 / c.temperature, c.softcap, c.bias ? bias_bytes.data() : nullptr};
  pass.weight = c.weight ? weight_bytes.data() : nullptr;
  pass.want = kWantEntropy | kWantSumSq | kWantWeighted | kWantArgmax | kWantSoft;
  const auto tile = [&](std::vector<char>& data) {
    return c.rows > 1 ? Tile{data.data(), c.dtype, 1, c.rows} : Tile{data.data(), c.dtype, c.classes, 1};
  };
  const int64_t blocks = (c.classes + kBlock - 1) / kBlock;
  std::vector<int64_t> id;
  for (int r = 0; r < c.rows; ++r) {
    id.push_back(r * 17 % c.classes);
    id.push_back(c.classes - 1);
  }
  const TargetIds ids{2, id.data()};

  const RowKernels& k = wide ? kernels.f64 : kernels.f32;
  Buffers buffers;
  Outcome out;
  out.z.resize(id.size());
  const int64_t row_room = (c.rows + kRowGroup - 1) / kRowGroup * kRowGroup;
  std::vector<double> partials(blocks * kPartialFields * row_room);
  std::vector<double> powers((c.classes + kLanes) * row_room);
  out.ranks.resize(c.rows * blocks * 2);
  out.stats.resize(c.rows);
  k.gather(pass, tile(logits), c.rows, ids, out.z.data());
  Scanned scanned{{partials.data(), row_room}, out.z.data(), out.ranks.data()};
  k.scan(pass, tile(logits), tile(soft), c.rows, 0, blocks, ids, scanned, buffers.scratch);
  for (int64_t field = 0; field < blocks * kPartialFields; ++field) {
    const auto row = partials.begin() + field * row_room;
    out.partials.insert(out.partials.end(), row, row + c.rows);
  }
  k.finish(pass, tile(logits), c.rows, scanned.partials, out.stats.data(), buffers.scratch);
  std::vector<GradientRow> coefficients(c.rows);
  std::vector<double> g(id.size(), 0.25), corrected(id.size()), scale(c.rows, 0.75);
  std::vector<double> block_max(blocks * c.rows);
  for (int r = 0; r < c.rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) block_max[r * blocks + b] = scanned.partials.row(b, kMax)[r];
    coefficients[r] = {out.stats[r].max, out.stats[r].rest, 0.5, 0.125, 0.375, -0.01, -0.75, false};
    if (c.kind == 0 && r % 2 == 0) coefficients[r] = {out.stats[r].max, out.stats[r].rest, 0.5, 0, 0, 0, 0, false};
    coefficients[r].block_max = &block_max[r * blocks];
  }
  coefficients[c.rows / 2].zero = c.rows > 1;
  out.soft_gradient.resize(logits.size());
  k.soft_gradient(pass, tile(logits), c.rows, 0, blocks, out.stats.data(), scale.data(), tile(out.soft_gradient),
                  buffers.scratch);
  if (c.rows == 1) {
    const auto sample = [&](auto* kept) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int count = k.sample(pass, tile(logits), tile(soft), block, coefficients[0], {1, id.data()}, g.data(), {},
                                   {0.01, {0x12345678, 0x9abcdef0}}, kept, buffers.scratch);
        for (int i = 0; i < count; ++i) {
          out.sampled.push_back(kept[i].column);
          out.sampled.push_back(kept[i].value);
        }
      }
    };
    std::vector<Kept<double>> kept_wide(kBlock);
    std::vector<Kept<float>> kept(kBlock);
    wide ? sample(kept_wide.data()) : sample(kept.data());
  }
  const std::vector<int32_t> combined_rows = {c.rows - 1, 0, c.rows / 2};
  const std::vector<char> factors = stored({0.3, -1.7, 0.01}, wide ? kF64 : kF32);
  out.combined.resize(logits.size() / c.rows);
  k.weighted_rows({logits.data(), c.dtype, c.classes, 1}, c.classes, combined_rows.data(), factors.data(), 3,
                  {out.combined.data(), c.dtype, 0, 1}, false);
  const std::vector<char> numbers = stored(x, wide ? kF64 : kF32);
  out.rounded.resize(logits.size());
  k.round(numbers.data(), c.classes, c.rows, static_cast<int>(c.classes), {out.rounded.data(), c.dtype, c.classes, 1}, true);
  // Rows of 40 features for some rows and columns: of the same numbers, so that there need to be enough of them.
  const int64_t depth = 40, columns = std::min<int64_t>(c.classes * c.rows / depth, 70),
                left_rows = std::min<int64_t>(columns, 8);
  std::vector<char> room(depth * kLanes * sizeof(double));
  out.product.assign(left_rows * columns * sizeof(double), 0);
  k.ordered_product(numbers.data(), depth, left_rows, {logits.data(), c.dtype, depth, 1}, 0, columns, depth, nullptr,
                    {out.product.data(), c.dtype, columns, 1}, true, room.data());
  room.resize(room_of_product(columns, depth) * sizeof(double));
  for (std::vector<char>& sums : out.sums) sums.assign(left_rows * columns * sizeof(double), 0);
  const Tile left = {logits.data(), c.dtype, 1, left_rows}, right = {logits.data(), c.dtype, 1, columns};
  for (const ProductSums sums : {ProductSums::kAdded, ProductSums::kInBlocks}) {
    k.product(left, left_rows, right, columns, depth, sums, out.sums[sums == ProductSums::kInBlocks].data(), columns,
              room.data());
  }
  out.gradient = logits;  // in place
  k.gradient(pass, tile(out.gradient), c.kind == 0 ? Tile{} : tile(soft), c.rows, 0, blocks, coefficients.data(), ids, g.data(),
             corrected.data(), {}, tile(out.gradient), buffers.scratch);
  if (c.softcap == 0) {
    pass.weight = nullptr;
    pass.want = 0;
    scanned.ranks = nullptr;
    for (GradientRow& row : coefficients) row.b = row.c = row.d = row.e = 0;
    const auto plain_gradient = [&](std::vector<char>& from, std::vector<char>& to) {
      to.resize(logits.size());
      k.gradient(pass, tile(from), {}, c.rows, 0, blocks, coefficients.data(), ids, g.data(), corrected.data(), scanned,
                 tile(to), buffers.scratch);
    };
    plain_gradient(logits, out.plain_gradient);
    scanned.powers = powers.data();
    k.scan(pass, tile(logits), {}, c.rows, 0, blocks, ids, scanned, buffers.scratch);
    plain_gradient(logits, out.gradient_of_powers);
    out.gradient_in_place = out.gradient_of_powers;
    if (c.rows == 1 && (c.dtype == kF32 || c.dtype == kF64)) {
      out.gradient_in_place = logits;
      scanned.powers = out.gradient_in_place.data();
      scanned.last_powers = powers.data();
      k.scan(pass, tile(out.gradient_in_place), {}, c.rows, 0, blocks, ids, scanned, buffers.scratch);
      plain_gradient(out.gradient_in_place, out.gradient_in_place);
    }
  }
  return out;
}

const char* difference(const Outcome& a, const Outcome& b, Dtype dtype) {
  if (!same_doubles(a.z.data(), b.z.data(), a.z.size() * sizeof(double))) return "target logits";
  if (!same_doubles(a.partials.data(), b.partials.data(), a.partials.size() * sizeof(double))) return "partials";
  if (!same_doubles(a.stats.data(), b.stats.data(), a.stats.size() * sizeof(RowStats))) return "statistics";
  if (a.ranks != b.ranks) return "ranks";
  if (!same_numbers(a.gradient, b.gradient, dtype)) return "gradient";
  if (!same_numbers(a.plain_gradient, b.plain_gradient, dtype)) return "plain gradient";
  for (const Outcome* o : {&a, &b}) {
    if (!same_numbers(o->plain_gradient, o->gradient_of_powers, dtype)) return "gradient of powers";
    if (!same_numbers(o->plain_gradient, o->gradient_in_place, dtype)) return "gradient of powers in place";
  }
  if (!same_numbers(a.soft_gradient, b.soft_gradient, dtype)) return "gradient by the soft targets";
  if (a.sampled.size() != b.sampled.size()) return "number of sampled entries";
  if (!same_doubles(a.sampled.data(), b.sampled.data(), a.sampled.size() * sizeof(double))) return "sampled entries";
  if (!same_numbers(a.combined, b.combined, dtype)) return "weighted rows";
  if (!same_numbers(a.rounded, b.rounded, dtype)) return "rounded rows";
  if (!same_numbers(a.product, b.product, dtype)) return "a product";
  for (int i = 0; i < 2; ++i) {
    if (!same_numbers(a.sums[i], b.sums[i], dtype == kF64 ? kF64 : kF32)) return "sums of products";
  }
  return nullptr;
}

}  // namespace

int main() {
  std::vector<const Kernels*> others;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(FASTLOSS_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) others.push_back(&kernels_avx2);
#endif
#if defined(FASTLOSS_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    others.push_back(&kernels_avx512);
#endif
#if defined(FASTLOSS_HAVE_AVX512BF16)
  if (__builtin_cpu_supports("avx512bf16")) others.push_back(&kernels_avx512bf16);
#endif
#endif
#if defined(FASTLOSS_HAVE_NEON)
  others.push_back(&kernels_neon);
#endif
  if (others.empty()) {
    printf("nothing to compare with scalar on this machine\n");
    return 1;
  }
  int passed = 0, failed = 0;
  for (const Kernels* kernels : others) {
    for (const Dtype dtype : {kF32, kF64, kF16, kBF16}) {
      for (const int64_t classes : {1, 2, 15, 16, 17, 63, 64, 65, 521, 4095, 4096, 4097, 4160, 9001}) {
        for (int kind = 0; kind < 5; ++kind) {
          for (const bool transformed : {false, true}) {
            for (const int rows : {1, 5, 37}) {
              if (rows > 1 && classes > 521) continue;
              const Case c{dtype,       classes,     rows, transformed ? 30.0 : 0.0, transformed ? 0.7 : 1.0,
                           transformed, transformed, kind};
              const char* what = difference(run(kernels_scalar, c), run(*kernels, c), dtype);
              if (!what) {
                ++passed;
                continue;
              }
              ++failed;
              printf("%s: %s differ: dtype %d, %d classes, %d rows, kind %d%s\n", kernels->name, what, dtype,
                     static_cast<int>(classes), rows, kind, transformed ? ", transformed" : "");
            }
          }
        }
      }
    }
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
