// SPDX-License-Identifier: Apache-2.0
// 512-bit vectors: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "scalar.hpp"

namespace fastloss {
namespace {

struct Avx512F64;

struct Avx512F32 {
  using T = float;
  using Wide = Avx512F64;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kInFlight = 8;
  static Reg set(T x) { return _mm512_set1_ps(x); }
  static T first(Reg a) { return _mm512_cvtss_f32(a); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BF16* p) { return widen_bf16s(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load_first(const float* p, int n, Reg behind) { return _mm512_mask_loadu_ps(behind, first_lanes(n), p); }
  static Reg load_first(const BF16* p, int n, Reg behind) {
    return _mm512_mask_mov_ps(behind, first_lanes(n), widen_bf16s(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
  }
  static Reg load_first(const F16* p, int n, Reg behind) {
    return _mm512_mask_cvtph_ps(behind, first_lanes(n), _mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void stream(float* p, Reg x) { _mm512_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }
  static void store(BF16* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16s(x)); }
  static void store(F16* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16s(x)); }
  static void stream(BF16* p, Reg x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16s(x)); }
  static void stream(F16* p, Reg x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16s(x)); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg copy_sign(Reg a, Reg sign) { return _mm512_or_ps(abs(a), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f))); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
  }
  static int count_greater(Reg a, Reg b) { return __builtin_popcount(mask_greater(a, b)); }
  static uint32_t mask_greater(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Reg random(uint32_t column, RandomKey key) {
    const __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i steps = _mm512_mullo_epi32(from, _mm512_set1_epi32(static_cast<int>(kColumnFactor)));  // a constant
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(column * kColumnFactor)), steps);
    x = _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(key.first)));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(static_cast<int>(key.second)));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
    return _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 1));
  }
  static Reg zero_where_zero(Reg x, Reg w) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
  }
  template <int kBy>
  static Reg shift_down(Reg a) {
    const __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_add_epi32(from, _mm512_set1_epi32(kBy)), a);
  }
  static Reg power_of_two(Reg x) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kEighths)));
    const __m512i bits = _mm512_castps_si512(x);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(bits, table), _mm512_slli_epi32(bits, 20)));
  }

 private:
  static __mmask16 first_lanes(int n) { return n < kWidth ? (1u << n) - 1 : 0xffff; }
  static Reg widen_bf16s(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m256i to_bf16s(Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i chosen = _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, half);  // NaN stays NaN
    const __mmask16 subnormal = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    const __m512i flushed = _mm512_mask_and_epi32(chosen, subnormal, bits, _mm512_set1_epi32(INT32_MIN));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(flushed, 16));
  }
  static __m256i to_f16s(Reg x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
};

struct Avx512F64 {
  using T = double;
  using Wide = Avx512F64;
  using Reg = __m512d;
  static constexpr int kWidth = 8;
  static constexpr int kInFlight = 8;
  static Reg set(T x) { return _mm512_set1_pd(x); }
  static T first(Reg a) { return _mm512_cvtsd_f64(a); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load_first(const double* p, int n, Reg behind) {
    return _mm512_mask_loadu_pd(behind, n < kWidth ? (1u << n) - 1 : 0xff, p);
  }
  static void store(double* p, Reg x) { _mm512_storeu_pd(p, x); }
  static void stream(double* p, Reg x) { _mm512_stream_pd(p, x); }
  static void fence() { _mm_sfence(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg abs(Reg a) { return _mm512_abs_pd(a); }
  static Reg copy_sign(Reg a, Reg sign) { return _mm512_or_pd(abs(a), _mm512_and_pd(sign, _mm512_set1_pd(-0.0))); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm512_mask_mov_pd(no, _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ), yes);
  }
  static int count_greater(Reg a, Reg b) { return __builtin_popcount(mask_greater(a, b)); }
  static uint32_t mask_greater(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  static Reg random(uint32_t column, RandomKey key) {
    alignas(32) int32_t bits[kWidth];
    for (uint32_t i = 0; i < kWidth; ++i) bits[i] = random_bits(column + i, key);
    return _mm512_cvtepi32_pd(_mm256_load_si256(reinterpret_cast<const __m256i*>(bits)));
  }
  static Reg zero_where_zero(Reg x, Reg w) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(w, _mm512_setzero_pd(), _CMP_NEQ_UQ), x);
  }
  template <int kBy>
  static Reg shift_down(Reg a) {
    return _mm512_permutexvar_pd(_mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(kBy)), a);
  }
  static Reg exponent(Reg x) {
    const __m512i above = _mm512_sub_epi64(_mm512_castpd_si512(x), _mm512_set1_epi64(kSqrtHalf));
    return _mm512_cvtepi64_pd(_mm512_srli_epi64(above, 52));
  }
  static Reg power_of_two(Reg x) { return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x), 52)); }
};

struct Avx512Isa {
  static constexpr const char* kName = "avx512";
  using F32 = Avx512F32;
  using F64 = Avx512F64;
};

}  // namespace
}  // namespace fastloss
