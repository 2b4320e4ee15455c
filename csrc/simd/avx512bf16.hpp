// SPDX-License-Identifier: Apache-2.0
// 512-bit vectors of a CPU that rounds to bfloat16 by itself: AVX-512 F, BW, DQ, VL, BF16.
#pragma once

#include "avx512.hpp"

namespace fastloss {
namespace {

struct Avx512Bf16F32 : Avx512F32 {
  using Avx512F32::store;
  using Avx512F32::stream;
  static void store(BF16* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16s(x)); }
  static void stream(BF16* p, Reg x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16s(x)); }

 private:
  static __m256i to_bf16s(Reg x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
};

struct Avx512Bf16Isa {
  static constexpr const char* kName = "avx512bf16";
  using F32 = Avx512Bf16F32;
  using F64 = Avx512F64;
};

}  // namespace
}  // namespace fastloss
