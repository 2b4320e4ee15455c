// SPDX-License-Identifier: Apache-2.0
#include "../simd/neon.hpp"

#include "kernels.inl"

const fastloss::Kernels fastloss::kernels_neon = fastloss::make_kernels<fastloss::NeonIsa>();
