# SPDX-License-Identifier: Apache-2.0
"""Any shape, any strides, any class axis, any values: what hypothesis finds must keep the contract."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import binding
import fastloss
import reference
from helpers import DTYPES, accumulation, assert_cross_entropy_contract, assert_same_bits
from reference import Options


@st.composite
def layouts(draw, max_side=9):
    """An array of numbers in some shape, with an order of axes in memory, steps and directions, and its class axis."""
    axes = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, max_side)) for _ in range(axes))
    axis = draw(st.integers(0, axes - 1))
    if draw(st.booleans()):
        shape = shape[:axis] + (draw(st.sampled_from([1, 63, 64, 65, 200])),) + shape[axis + 1 :]
    order = draw(st.permutations(range(axes)))
    steps = tuple(draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in range(axes))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    memory = np.zeros(tuple(shape[i] * abs(steps[i]) for i in order), dtype)
    view = memory.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
    assert view.shape == shape
    view[...] = (draw(st.sampled_from([0.1, 1.0, 8.0])) * rng.standard_normal(shape)).astype(dtype)
    return view, axis, rng


def draw_target(rng, logits, axis, soft):
    if soft:
        return rng.random(logits.shape).astype(accumulation(logits.dtype))
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    target = rng.integers(logits.shape[axis], size=rows)
    return np.where(rng.random(rows) < 0.2, -100, target)


@given(layouts(), st.booleans(), st.sampled_from(["none", "sum", "mean"]))
def test_every_layout_keeps_the_contract(layout, soft, reduction):
    logits, axis, rng = layout
    target = draw_target(rng, logits, axis, soft)
    loss, gradient = fastloss.cross_entropy(logits, target, axis=axis, reduction=reduction, return_grad=True)
    assert gradient.shape == logits.shape
    flat_target = reference.as_rows(target, axis) if soft else np.ravel(target)
    flat_loss = np.ravel(loss) if reduction == "none" else np.asarray(loss)
    rows = reference.as_rows(logits, axis)
    assert_cross_entropy_contract(flat_loss, reference.as_rows(gradient, axis), rows, flat_target, reduction=reduction)


@given(layouts(), st.booleans())
def test_every_layout_has_the_bits_of_the_contiguous_one(layout, soft):
    logits, axis, rng = layout
    target = draw_target(rng, logits, axis, soft)
    loss, gradient = fastloss.cross_entropy(logits, target, axis=axis, return_grad=True)
    plain = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
    plain_target = np.ascontiguousarray(np.moveaxis(target, axis, -1)) if soft else target
    plain_loss, plain_gradient = fastloss.cross_entropy(plain, plain_target, axis=-1, return_grad=True)
    assert_same_bits(loss, plain_loss)
    assert_same_bits(np.moveaxis(gradient, axis, -1), plain_gradient)


@given(layouts())
def test_gradient_may_have_other_strides_than_the_logits(layout):
    logits, axis, rng = layout
    target = draw_target(rng, logits, axis, False)
    expected = np.zeros(logits.shape, logits.dtype)
    binding.Call(logits, target, Options(), axis).forward(expected)
    other = np.zeros((*(2 * side for side in logits.shape),), logits.dtype)[tuple(slice(None, None, 2) for _ in logits.shape)]
    binding.Call(logits, target, Options(), axis).forward(other)
    assert_same_bits(other, expected)


@given(layouts())
def test_in_place_is_right_in_every_layout(layout):
    logits, axis, rng = layout
    target = draw_target(rng, logits, axis, False)
    expected = np.zeros(logits.shape, logits.dtype)
    binding.Call(logits, target, Options(), axis).forward(expected)
    binding.Call(logits, target, Options(), axis).forward(logits)
    assert_same_bits(logits, expected)


EXTREMES = st.one_of(
    st.floats(-200, 200, width=32),
    st.sampled_from([-np.inf, 0.0, -0.0, 1e-40, -1e-40, 1e4, -1e4, 3e38, -3e38, 65504.0, 1e-45]),
)


@given(st.lists(EXTREMES, min_size=1, max_size=150), st.data())
def test_extreme_values_keep_the_contract(values, data):
    logits = np.array([values], np.float32)
    if np.all(np.isneginf(logits)):
        logits[0, 0] = 0
    target = np.array([data.draw(st.integers(0, logits.shape[1] - 1))])
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")


@given(st.lists(EXTREMES, min_size=1, max_size=150))
def test_probabilities_add_up_to_one(values):
    logits = np.array([values], np.float32)
    if np.all(np.isneginf(logits)):
        logits[0, 0] = 0
    _, gradient = fastloss.cross_entropy(logits, np.zeros(1, np.int64), reduction="none", return_grad=True)
    assert abs(reference.wide(gradient).sum()) <= 2.0**-22


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_gradient_does_not_depend_on_a_constant_added_to_the_logits(classes, count, seed):
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.standard_normal((count, classes)) * 64) / 64).astype(np.float32)
    target = rng.integers(classes, size=count)
    _, here = fastloss.cross_entropy(logits, target, return_grad=True)
    _, there = fastloss.cross_entropy(logits + np.float32(512), target, return_grad=True)
    assert_same_bits(here, there)
