# SPDX-License-Identifier: Apache-2.0
"""The names under which the benchmark of a GPU lists kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks.gpu_timing import short_name

NAMES = {
    "void fastloss::(anonymous namespace)::sample_kernel<fastloss::(anonymous namespace)::BF16, false>(fastloss::Problem, "
    "fastloss::Loss, fastloss::Sample)": "sample_kernel",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int, "
    "at::native::FillFunctor<int>, std::array<char*, 1ul>)": "vectorized_elementwise_kernel",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT",
    "Memset (Device)": "Memset",
    "void cub::DeviceRadixSortKernel<cub::Policy<int, (bool)1, (anonymous namespace)::X>::P>(int*)": "DeviceRadixSortKernel",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_kernels_are_short(name):
    assert short_name(name) == NAMES[name]
