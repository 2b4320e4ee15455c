// SPDX-License-Identifier: Apache-2.0
#include "../simd/scalar.hpp"

#include "kernels.inl"

const fastloss::Kernels fastloss::kernels_scalar = fastloss::make_kernels<fastloss::ScalarIsa>();
