// SPDX-License-Identifier: Apache-2.0
#include "../simd/avx512.hpp"

#include "kernels.inl"

const fastloss::Kernels fastloss::kernels_avx512 = fastloss::make_kernels<fastloss::Avx512Isa>();
