# SPDX-License-Identifier: Apache-2.0
"""Gradients that forward makes for an upstream gradient that it expects: kernels run on the CPU by tests/cuda_emulation."""

import numpy as np
import pytest

from cuda_binding import CudaCall, Expected, load_emulation, poisoned
from helpers import DEFAULT, DTYPES, assert_same_bits
from reference import Options

cuda = load_emulation()
INF = np.inf

# Rows of one warp, of a block, of blocks that share them, beside each other; those of 36 kB take more warps in one trip.
SHAPES = [((9, 300), 1), ((9, 9001), 1), ((2, 150_000), 1), ((40, 33), 0)]


def made_ahead(logits, axis, upstream, rng, options=DEFAULT):
    """A call that has made its gradient for this upstream gradient."""
    target = rng.integers(logits.shape[axis], size=np.moveaxis(logits, axis, -1).shape[:-1])
    call = CudaCall(cuda, logits, target, options, axis)
    gradient = poisoned(logits)
    call.forward(gradient, np.asarray(upstream, np.float64))
    return call, gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("options", [DEFAULT, Options(label_smoothing=0.1, softcap=5.0)], ids=["plain", "full"])
def test_gradient_made_for_what_came_has_the_bits_of_backward_and_is_left_alone(options, shape, axis, dtype, rng, order):
    logits = rng.standard_normal(shape).astype(DTYPES[dtype])
    call, gradient = made_ahead(logits, axis, -2.5, rng, options)
    assert_same_bits(call.backward(poisoned(logits), -2.5), gradient)
    marked = np.full_like(logits, 5)
    assert np.all(call.backward(marked, -2.5, Expected(-2.5, -2.5)) == 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("came", [1.0, np.nextafter(np.float32(0.7), np.float32(1)), 0.0, -0.0, INF, np.nan])
def test_gradient_made_for_something_else_becomes_that_of_backward(came, shape, axis, dtype, rng, order):
    logits = rng.standard_normal(shape).astype(DTYPES[dtype])
    call, gradient = made_ahead(logits, axis, np.float32(0.7), rng)
    expected = call.backward(poisoned(logits), came)
    assert_same_bits(call.backward(gradient, came, Expected(np.float32(0.7), 3.0)), expected)


@pytest.mark.parametrize("garbage", [np.nan, 0.0, -0.0])
def test_gradient_made_for_garbage_serves_no_other(garbage, rng):
    logits = rng.standard_normal((9, 300)).astype(np.float32)
    call, gradient = made_ahead(logits, 1, garbage, rng)
    for came in (0.0, -0.0, 1.0):
        if np.float64(came).tobytes() == np.float64(garbage).tobytes():
            continue
        expected = call.backward(poisoned(logits), came)
        assert_same_bits(call.backward(gradient.copy(), came, Expected(garbage, 1.0)), expected)


def test_backward_without_a_gradient_makes_one_and_learns_all_the_same(rng, order):
    logits = rng.standard_normal((9, 300)).astype(np.float32)
    call, _ = made_ahead(logits, 1, 1.0, rng)
    expected = Expected(None, 2.0)
    assert_same_bits(call.backward(poisoned(logits), 2.0, expected), call.backward(poisoned(logits), 2.0))
    assert (expected.next, expected.surprised) == (2.0, 0)


@pytest.mark.parametrize(
    ("came", "following"),
    [(0.1, np.float64(0.1)), (-4.0, -4.0), (0.0, 3.0), (-0.0, 3.0), (INF, 3.0), (-INF, 3.0), (np.nan, 3.0)],
)
def test_what_came_is_expected_next_if_it_is_any_guide(came, following, rng):
    logits = rng.standard_normal((9, 300))
    call, gradient = made_ahead(logits, 1, 3.0, rng)
    expected = Expected(3.0, 3.0)
    call.backward(gradient, came, expected)
    assert (expected.next, expected.surprised) == (following, 1)
    call.backward(gradient, expected.next, expected)
    assert expected.surprised == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_has_the_same_bits_whether_the_gradient_is_made_or_not(reduction, shape, axis, dtype, rng, order):
    logits = (3 * rng.standard_normal(shape)).astype(DTYPES[dtype])
    target = rng.integers(shape[axis], size=np.moveaxis(logits, axis, -1).shape[:-1])
    without, made = (CudaCall(cuda, logits, target, Options(), axis, reduction) for _ in range(2))
    without.forward(as_with_gradient=True)
    made.forward(poisoned(logits))
    assert_same_bits(without.loss, made.loss)
    assert_same_bits(without.saved, made.saved)
    assert_same_bits(without.scale, made.scale)
