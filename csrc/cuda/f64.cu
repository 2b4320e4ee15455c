// SPDX-License-Identifier: Apache-2.0
#include "kernels.inl"

const fastloss::KernelTable fastloss::cuda_f64 = fastloss::kernel_table<double>();
