// SPDX-License-Identifier: Apache-2.0
// 256-bit vectors: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "scalar.hpp"

namespace fastloss {
namespace {

struct Avx2F64;

struct Avx2F32 {
  using T = float;
  using Wide = Avx2F64;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kInFlight = 8;
  static Reg set(T x) { return _mm256_set1_ps(x); }
  static T first(Reg a) { return _mm256_cvtss_f32(a); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BF16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Reg load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <class T>
  static Reg load_first(const T* p, int n, Reg behind) {
    return load_first_of_copy<Avx2F32>(p, n, behind);
  }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void stream(float* p, Reg x) { _mm256_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }
  static void store(BF16* p, Reg x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16s(x)); }
  static void store(F16* p, Reg x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16s(x)); }
  static void stream(BF16* p, Reg x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16s(x)); }
  static void stream(F16* p, Reg x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16s(x)); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg abs(Reg a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static Reg copy_sign(Reg a, Reg sign) { return _mm256_or_ps(abs(a), _mm256_and_ps(sign, set(-0.0f))); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static int count_greater(Reg a, Reg b) { return __builtin_popcount(mask_greater(a, b)); }
  static uint32_t mask_greater(Reg a, Reg b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static Reg random(uint32_t column, RandomKey key) {
    const __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                             _mm256_set1_epi32(static_cast<int>(kColumnFactor)));  // a constant
    __m256i x = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(column * kColumnFactor)), steps);
    x = _mm256_xor_si256(x, _mm256_set1_epi32(static_cast<int>(key.first)));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7feb352d));
    x = _mm256_xor_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(static_cast<int>(key.second)));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(0x846ca68bu)));
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 1));
  }
  static Reg zero_where_zero(Reg x, Reg w) { return _mm256_and_ps(x, _mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ)); }
  template <int kBy>
  static Reg shift_down(Reg a) {
    const __m256i from = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(a, _mm256_add_epi32(from, _mm256_set1_epi32(kBy)));
  }
  static Reg power_of_two(Reg x) {
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kEighths));
    const __m256i bits = _mm256_castps_si256(x);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits), _mm256_slli_epi32(bits, 20)));
  }

 private:
  static __m128i to_bf16s(Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 chosen =
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256 normal = _mm256_cmp_ps(abs(x), set(0x1p-126f), _CMP_NLT_UQ);
    const __m256 flushed = _mm256_and_ps(chosen, _mm256_or_ps(normal, set(-0.0f)));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(flushed), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
  }
  static __m128i to_f16s(Reg x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
};

struct Avx2F64 {
  using T = double;
  using Wide = Avx2F64;
  using Reg = __m256d;
  static constexpr int kWidth = 4;
  static constexpr int kInFlight = 1;
  static Reg set(T x) { return _mm256_set1_pd(x); }
  static T first(Reg a) { return _mm256_cvtsd_f64(a); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load_first(const double* p, int n, Reg behind) { return load_first_of_copy<Avx2F64>(p, n, behind); }
  static void store(double* p, Reg x) { _mm256_storeu_pd(p, x); }
  static void stream(double* p, Reg x) { _mm256_stream_pd(p, x); }
  static void fence() { _mm_sfence(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg abs(Reg a) { return _mm256_andnot_pd(set(-0.0), a); }
  static Reg copy_sign(Reg a, Reg sign) { return _mm256_or_pd(abs(a), _mm256_and_pd(sign, set(-0.0))); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm256_blendv_pd(no, yes, _mm256_cmp_pd(a, b, _CMP_GT_OQ));
  }
  static int count_greater(Reg a, Reg b) { return __builtin_popcount(mask_greater(a, b)); }
  static uint32_t mask_greater(Reg a, Reg b) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ)));
  }
  static Reg random(uint32_t column, RandomKey key) {
    const __m128i bits = _mm_setr_epi32(random_bits(column, key), random_bits(column + 1, key), random_bits(column + 2, key),
                                        random_bits(column + 3, key));
    return _mm256_cvtepi32_pd(bits);
  }
  static Reg zero_where_zero(Reg x, Reg w) { return _mm256_and_pd(x, _mm256_cmp_pd(w, _mm256_setzero_pd(), _CMP_NEQ_UQ)); }
  template <int kBy>
  static Reg shift_down(Reg a) {
    return kBy == 2 ? _mm256_permute4x64_pd(a, 0x0e) : _mm256_permute4x64_pd(a, 0x01);
  }
  static Reg exponent(Reg x) {
    // A small integer in the low bits of 2^52 is what that number has more.
    const __m256i above = _mm256_srli_epi64(_mm256_sub_epi64(_mm256_castpd_si256(x), _mm256_set1_epi64x(kSqrtHalf)), 52);
    return sub(_mm256_castsi256_pd(_mm256_or_si256(above, _mm256_castpd_si256(set(0x1p+52)))), set(0x1p+52));
  }
  static Reg power_of_two(Reg x) { return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x), 52)); }
};

struct Avx2Isa {
  static constexpr const char* kName = "avx2";
  using F32 = Avx2F32;
  using F64 = Avx2F64;
};

}  // namespace
}  // namespace fastloss
