// SPDX-License-Identifier: Apache-2.0
#include "kernels.inl"

const fastloss::KernelTable fastloss::cuda_f16 = fastloss::kernel_table<F16>();
