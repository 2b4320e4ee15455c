# SPDX-License-Identifier: Apache-2.0
"""More than 2^31 elements: offsets must not wrap (flash-attention #714; pytorch #111484, #108345).

The memory is reserved but hardly touched: a page that nobody writes costs nothing.
"""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import binding
import fastloss
from helpers import assert_cross_entropy_contract, assert_same_bits, bfloat16
from reference import Options

pytestmark = pytest.mark.skipif(bfloat16 is None, reason="needs ml_dtypes")

BEYOND = 2**31 + 2**20


@pytest.fixture(scope="module")
def sparse():
    """4.3 GB of bfloat16 zeros, of which only what is written takes memory."""
    return np.zeros(BEYOND, np.uint16).view(bfloat16)


def available_bytes():
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))


def rows_apart(sparse, count, classes):
    """Rows whose last one lies beyond 2^31 elements."""
    step = (BEYOND - classes) // (count - 1)
    return as_strided(sparse, (count, classes), (step * 2, 2))


def test_row_stride_beyond_2_31_elements(sparse, rng):
    logits = rows_apart(sparse, 3, 5000)
    assert (logits.strides[0] // 2) * 2 > 2**31
    logits[...] = rng.standard_normal(logits.shape).astype(bfloat16)
    near = np.ascontiguousarray(logits)
    target = rng.integers(5000, size=3)
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    assert_cross_entropy_contract(loss, gradient, near, target, reduction="none")


def test_in_place_gradient_beyond_2_31_elements(sparse, rng):
    logits = rows_apart(sparse, 3, 5000)
    logits[...] = rng.standard_normal(logits.shape).astype(bfloat16)
    near = np.ascontiguousarray(logits)
    target = rng.integers(5000, size=3)
    loss = binding.Call(logits, target, Options(), reduction="none").forward(logits)
    assert_cross_entropy_contract(loss, np.ascontiguousarray(logits), near, target, reduction="none")


def test_class_stride_beyond_2_31_elements(sparse, rng):
    logits = rows_apart(sparse, 3, 70).T
    logits[...] = rng.standard_normal(logits.shape).astype(bfloat16)
    near = np.ascontiguousarray(logits)
    target = rng.integers(3, size=70)
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    assert_cross_entropy_contract(loss, gradient, near, target, reduction="none")


def test_more_than_2_31_elements_in_all(rng):
    classes = 128256
    count = BEYOND // classes + 1
    row = rng.standard_normal((1, classes)).astype(bfloat16)
    logits = np.broadcast_to(row, (count, classes))
    assert logits.size > 2**31
    target = np.full(count, -100)
    target[[0, count // 2, count - 1]] = [5, 77777, classes - 1]
    losses = fastloss.cross_entropy(logits, target, reduction="none")
    alone = fastloss.cross_entropy(row, np.array([classes - 1]), reduction="none")
    assert_same_bits(losses[-1:], alone)
    assert np.count_nonzero(losses) == 3


def test_every_row_of_more_than_2_31_elements_is_computed(rng):
    classes = 128256
    count = BEYOND // classes + 1
    row = rng.standard_normal((1, classes)).astype(bfloat16)
    logits = np.broadcast_to(row, (count, classes))
    argmax = fastloss.logit_stats(logits, want=("argmax",)).argmax
    np.testing.assert_array_equal(argmax, np.argmax(row.astype(np.float32)))


@pytest.mark.skipif(available_bytes() < 8 * 2**30, reason="needs 4.3 GB of memory")
def test_gradient_of_more_than_2_31_elements_side_by_side(rng):
    classes = 2**18
    logits = np.zeros((BEYOND // classes, classes), bfloat16)
    last = len(logits) - 1
    target = np.full(len(logits), -100)
    checked = np.array([0, 2**31 // classes - 1, 2**31 // classes, last])
    logits[checked] = rng.standard_normal((4, classes)).astype(bfloat16)
    near = logits[checked]
    target[checked] = [1, 2, 3, classes - 1]
    losses = binding.Call(logits, target, Options(), reduction="none").forward(logits)
    assert_cross_entropy_contract(losses[checked], logits[checked], near, target[checked], reduction="none")
    assert np.count_nonzero(losses) == 4


def test_a_million_classes_in_one_row(rng):
    logits = rng.standard_normal((1, 1_000_003)).astype(np.float32)
    target = np.array([1_000_002])
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")
