// SPDX-License-Identifier: Apache-2.0
// 128-bit vectors: AArch64 Advanced SIMD.
#pragma once

#include <arm_neon.h>

#include "scalar.hpp"

namespace fastloss {
namespace {

struct NeonF64;

struct NeonF32 {
  using T = float;
  using Wide = NeonF64;
  using Reg = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kInFlight = 1;
  static Reg set(T x) { return vdupq_n_f32(x); }
  static T first(Reg a) { return vgetq_lane_f32(a, 0); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const BF16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  static Reg load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  template <class T>
  static Reg load_first(const T* p, int n, Reg behind) {
    return load_first_of_copy<NeonF32>(p, n, behind);
  }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  template <class T>
  static void stream(T* p, Reg x) {  // NEON has no streaming stores
    store(p, x);
  }
  static void fence() {}
  static void store(BF16* p, Reg x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t chosen = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
    const uint32x4_t normal = vtstq_u32(bits, vdupq_n_u32(0x7f800000));
    vst1_u16(&p->bits, vshrn_n_u32(vandq_u32(chosen, vorrq_u32(normal, vdupq_n_u32(0x80000000))), 16));
  }
  static void store(F16* p, Reg x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  // Compare and select: FMAX and FMAXNM treat NaN otherwise than x86 does.
  static Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Reg abs(Reg a) { return vabsq_f32(a); }
  static Reg copy_sign(Reg a, Reg sign) { return vbslq_f32(vdupq_n_u32(0x80000000), sign, a); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static int count_greater(Reg a, Reg b) { return static_cast<int>(vaddvq_u32(vshrq_n_u32(vcgtq_f32(a, b), 31))); }
  static uint32_t mask_greater(Reg a, Reg b) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(bit)));
  }
  static Reg random(uint32_t column, RandomKey key) {
    const uint32_t steps[4] = {0, kColumnFactor, 2 * kColumnFactor, 3 * kColumnFactor};
    uint32x4_t x = vaddq_u32(vdupq_n_u32(column * kColumnFactor), vld1q_u32(steps));
    x = veorq_u32(x, vdupq_n_u32(key.first));
    x = vmulq_n_u32(veorq_u32(x, vshrq_n_u32(x, 16)), 0x7feb352du);
    x = veorq_u32(veorq_u32(x, vshrq_n_u32(x, 15)), vdupq_n_u32(key.second));
    x = vmulq_n_u32(x, 0x846ca68bu);
    return vcvtq_f32_u32(vshrq_n_u32(x, 1));
  }
  static Reg zero_where_zero(Reg x, Reg w) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vceqzq_f32(w))); }
  template <int kBy>
  static Reg shift_down(Reg a) {
    return vextq_f32(a, a, kBy);
  }
  static Reg power_of_two(Reg x) {
    const uint8x16x2_t table = {{vreinterpretq_u8_u32(vld1q_u32(kEighths)), vreinterpretq_u8_u32(vld1q_u32(kEighths + 4))}};
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(bits, vdupq_n_u32(7)), vdupq_n_u32(0x04040404));
    const uint32x4_t entry = vreinterpretq_u32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)));
    return vreinterpretq_f32_u32(vaddq_u32(entry, vshlq_n_u32(bits, 20)));
  }
};

struct NeonF64 {
  using T = double;
  using Wide = NeonF64;
  using Reg = float64x2_t;
  static constexpr int kWidth = 2;
  static constexpr int kInFlight = 1;
  static Reg set(T x) { return vdupq_n_f64(x); }
  static T first(Reg a) { return vgetq_lane_f64(a, 0); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static Reg load_first(const double* p, int n, Reg behind) { return load_first_of_copy<NeonF64>(p, n, behind); }
  static void store(double* p, Reg x) { vst1q_f64(p, x); }
  static void stream(double* p, Reg x) { vst1q_f64(p, x); }
  static void fence() {}
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static Reg abs(Reg a) { return vabsq_f64(a); }
  static Reg copy_sign(Reg a, Reg sign) { return vbslq_f64(vdupq_n_u64(0x8000000000000000), sign, a); }
  static Reg select_greater(Reg a, Reg b, Reg yes, Reg no) { return vbslq_f64(vcgtq_f64(a, b), yes, no); }
  static int count_greater(Reg a, Reg b) { return static_cast<int>(vaddvq_u64(vshrq_n_u64(vcgtq_f64(a, b), 63))); }
  static uint32_t mask_greater(Reg a, Reg b) {
    const uint64x2_t greater = vcgtq_f64(a, b);
    return static_cast<uint32_t>((vgetq_lane_u64(greater, 0) & 1) | (vgetq_lane_u64(greater, 1) & 2));
  }
  static Reg random(uint32_t column, RandomKey key) {
    const double bits[2] = {double(random_bits(column, key)), double(random_bits(column + 1, key))};
    return vld1q_f64(bits);
  }
  static Reg zero_where_zero(Reg x, Reg w) { return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x), vceqzq_f64(w))); }
  template <int kBy>
  static Reg shift_down(Reg a) {
    return vextq_f64(a, a, kBy);
  }
  static Reg exponent(Reg x) {
    return vcvtq_f64_u64(vshrq_n_u64(vsubq_u64(vreinterpretq_u64_f64(x), vdupq_n_u64(kSqrtHalf)), 52));
  }
  static Reg power_of_two(Reg x) { return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(x), 52)); }
};

struct NeonIsa {
  static constexpr const char* kName = "neon";
  using F32 = NeonF32;
  using F64 = NeonF64;
};

}  // namespace
}  // namespace fastloss
