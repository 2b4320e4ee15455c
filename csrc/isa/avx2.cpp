// SPDX-License-Identifier: Apache-2.0
#include "../simd/avx2.hpp"

#include "kernels.inl"

const fastloss::Kernels fastloss::kernels_avx2 = fastloss::make_kernels<fastloss::Avx2Isa>();
