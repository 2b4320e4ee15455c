// SPDX-License-Identifier: Apache-2.0
#include "../simd/avx512bf16.hpp"

#include "kernels.inl"

const fastloss::Kernels fastloss::kernels_avx512bf16 = fastloss::make_kernels<fastloss::Avx512Bf16Isa>();
