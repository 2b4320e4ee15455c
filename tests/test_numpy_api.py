# SPDX-License-Identifier: Apache-2.0
"""`fastloss.cross_entropy` as NumPy users call it: options, layouts, axes, dtypes, reductions, denominators, memory."""

import inspect
import tracemalloc

import numpy as np
import pytest

import fastloss
import reference
from helpers import DTYPES, accumulation, assert_cross_entropy_contract, assert_same_bits
from reference import Options

INTEGER_TYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">i8"]


@pytest.fixture
def logits(rng):
    return (3 * rng.standard_normal((6, 50))).astype(np.float32)


@pytest.fixture
def target(rng):
    return rng.integers(50, size=6)


def test_signature_is_the_documented_one():
    documented = (
        "(logits, target, weight=None, *, axis=None, ignore_index=-100, reduction='mean', label_smoothing=0.0, "
        "z_loss=0.0, softcap=None, temperature=1.0, bias=None, denominator=None, return_grad=False)"
    )
    parameters = inspect.signature(fastloss.cross_entropy).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == documented


# ---- reductions and denominators ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_reduction_is_that_of_the_oracle(reduction, soft, weighted, logits, target, rng):
    target = rng.dirichlet(np.ones(50), 6).astype(np.float32) if soft else np.where(np.arange(6) == 2, -100, target)
    weight = rng.uniform(0.1, 3, 50).astype(np.float32) if weighted else None
    loss, gradient = fastloss.cross_entropy(logits, target, weight, reduction=reduction, return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target, Options(weight=weight), reduction)


# Liger and others: the mean over ignored rows too.
def test_mean_is_over_the_rows_that_count(logits, target):
    ignored = target.copy()
    ignored[[1, 4]] = -100
    counted = [0, 2, 3, 5]
    assert_same_bits(fastloss.cross_entropy(logits, ignored), fastloss.cross_entropy(logits[counted], target[counted]))


# Megatron #737 and others: weights times label smoothing.
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weights_times_label_smoothing(reduction, logits, target, rng):
    weight = rng.uniform(0.1, 3, 50).astype(np.float32)
    options = {"label_smoothing": 0.3, "reduction": reduction}
    loss, gradient = fastloss.cross_entropy(logits, target, weight, return_grad=True, **options)
    assert_cross_entropy_contract(loss, gradient, logits, target, Options(weight=weight, label_smoothing=0.3), reduction)


@pytest.mark.parametrize("denominator", [1, 7, 0.25, 1e6, np.float32(3), np.int64(5)])
def test_denominator_divides_the_sum(denominator, logits, target):
    loss, gradient = fastloss.cross_entropy(logits, target, denominator=denominator, return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target, denominator=float(denominator))


def test_denominator_of_a_window_makes_micro_batches_add_up(logits, target):
    whole, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    halves = [fastloss.cross_entropy(logits[i], target[i], denominator=6, return_grad=True) for i in np.split(np.arange(6), 2)]
    assert float(halves[0][0]) + float(halves[1][0]) == pytest.approx(float(whole), rel=2.0**-23)
    assert_same_bits(np.concatenate([half[1] for half in halves]), gradient)


def test_gradient_of_reduction_none_is_that_of_the_sum(logits, target):
    _, of_none = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    _, of_sum = fastloss.cross_entropy(logits, target, reduction="sum", return_grad=True)
    assert_same_bits(of_none, of_sum)


# ---- values ----


def test_zero_smoothing_z_loss_and_unit_temperature_change_no_bit(logits, target):
    plain = fastloss.cross_entropy(logits, target, return_grad=True)
    spelled = fastloss.cross_entropy(
        logits, target, label_smoothing=0.0, z_loss=0.0, temperature=1.0, softcap=None, bias=None, return_grad=True
    )
    for one, other in zip(plain, spelled, strict=True):
        assert_same_bits(one, other)


def test_bias_is_added_to_the_logits(logits, target, rng):
    bias = (np.round(rng.standard_normal(50) * 16) / 16).astype(np.float32)
    exact = (np.round(logits * 16) / 16).astype(np.float32)
    with_bias, added = (
        fastloss.cross_entropy(exact, target, bias=bias, return_grad=True),
        fastloss.cross_entropy(exact + bias, target, return_grad=True),
    )
    for one, other in zip(with_bias, added, strict=True):
        assert_same_bits(one, other)


def test_one_hot_probabilities_have_the_loss_of_the_class(logits, target):
    one_hot = reference.one_hot(target, 50).astype(np.float32)
    assert_cross_entropy_contract(fastloss.cross_entropy(logits, one_hot), None, logits, target)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_may_have_any_of_the_four_dtypes(dtype, target_dtype, isa, rng):
    logits = rng.standard_normal((4, 300)).astype(DTYPES[dtype])
    target = rng.dirichlet(np.ones(300), 4).astype(DTYPES[target_dtype])
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    # The kernels take probabilities in the accumulation type.
    taken = target.astype(accumulation(logits.dtype))
    assert_cross_entropy_contract(loss, gradient, logits, taken)


@pytest.mark.parametrize("probabilities", ["zeros", "negative", "more than one"])
def test_probabilities_need_not_add_up_to_one(probabilities, logits, rng):
    target = {
        "zeros": np.zeros(logits.shape),
        "negative": -rng.random(logits.shape),
        "more than one": 5 * rng.random(logits.shape),
    }[probabilities].astype(np.float32)
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="sum", return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="sum")


# ---- dtypes ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_comes_in_the_accumulation_type_and_gradient_in_that_of_the_logits(reduction, dtype):
    logits = np.zeros((2, 3), DTYPES[dtype])
    loss, gradient = fastloss.cross_entropy(logits, np.array([0, 1]), reduction=reduction, return_grad=True)
    assert loss.dtype == accumulation(logits.dtype)
    assert gradient.dtype == logits.dtype


def test_bfloat16_of_ml_dtypes_comes_back_as_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = np.array([[1.0, 2.0, 3.0]], ml_dtypes.bfloat16)
    _, gradient = fastloss.cross_entropy(logits, np.array([0]), return_grad=True)
    assert gradient.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_targets_of_any_integer_type_are_the_same(dtype, logits, target):
    assert_same_bits(fastloss.cross_entropy(logits, target.astype(dtype)), fastloss.cross_entropy(logits, target))


def test_big_endian_logits_are_taken_by_value(logits, target):
    assert_same_bits(fastloss.cross_entropy(logits.astype(">f4"), target), fastloss.cross_entropy(logits, target))


def test_lists_of_numbers_are_arrays_of_float64():
    loss = fastloss.cross_entropy([[0.0, 1.0], [2.0, 0.0]], [1, 0])
    assert loss.dtype == np.float64
    assert_cross_entropy_contract(loss, None, np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([1, 0]))


@pytest.mark.parametrize("weight_dtype", ["float16", "float32", "float64", "int64"])
def test_weights_of_any_real_type_are_taken_by_value(weight_dtype, logits, target):
    weight = (1 + np.arange(50) % 4).astype(weight_dtype)
    assert_same_bits(
        fastloss.cross_entropy(logits, target, weight), fastloss.cross_entropy(logits, target, weight.astype(np.float32))
    )


# ---- axes and layouts ----


@pytest.mark.parametrize(("shape", "axis"), [((7,), 0), ((4, 7), 1), ((4, 7, 3), 1), ((4, 7, 3, 2), 1), ((2, 7, 2, 1, 3), 1)])
def test_axis_none_is_the_class_axis_of_pytorch(shape, axis, rng):
    logits = rng.standard_normal(shape).astype(np.float32)
    target = rng.integers(7, size=shape[:axis] + shape[axis + 1 :])
    default = fastloss.cross_entropy(logits, target, return_grad=True)
    spelled = fastloss.cross_entropy(logits, target, axis=axis, return_grad=True)
    for one, other in zip(default, spelled, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_any_axis_may_hold_the_classes(axis, soft, isa, rng):
    logits = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    moved_shape = np.moveaxis(logits, axis, -1).shape
    target = rng.random(logits.shape).astype(np.float32) if soft else rng.integers(moved_shape[-1], size=moved_shape[:-1])
    loss, gradient = fastloss.cross_entropy(logits, target, axis=axis, reduction="none", return_grad=True)
    assert loss.shape == moved_shape[:-1]
    assert_cross_entropy_contract(
        loss.ravel(),
        reference.as_rows(gradient, axis),
        reference.as_rows(logits, axis),
        reference.as_rows(target, axis) if soft else target.ravel(),
        reduction="none",
    )


def test_negative_strides_on_every_axis(isa, rng):
    logits = rng.standard_normal((4, 300, 5)).astype(np.float32)[::-1, ::-1, ::-1]
    target = rng.integers(300, size=(4, 5))[::-1, ::-1]
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    assert_cross_entropy_contract(loss, reference.as_rows(gradient, 1), reference.as_rows(logits, 1), target.ravel())


def test_logits_of_stride_zero_are_legal(isa, rng):
    logits = np.broadcast_to(rng.standard_normal(300).astype(np.float32), (4, 300))
    target = rng.integers(300, size=4)
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    assert_cross_entropy_contract(loss, gradient, logits, target)


def test_soft_targets_may_have_other_strides_than_the_logits(isa, rng):
    logits = rng.standard_normal((4, 70, 5)).astype(np.float32)
    target = np.asfortranarray(rng.random((4, 70, 5)).astype(np.float32))[:, ::-1]
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    assert_cross_entropy_contract(
        loss, reference.as_rows(gradient, 1), reference.as_rows(logits, 1), reference.as_rows(target, 1)
    )


def test_fields_of_packed_records_are_legal(rng):
    # Strides that are no whole number of elements.
    records = np.zeros((3, 9), np.dtype([("flag", "u1"), ("x", "f4")]))
    records["x"] = rng.standard_normal((3, 9))
    target = np.array([0, 8, 4])
    loss, gradient = fastloss.cross_entropy(records["x"], target, return_grad=True)
    assert_cross_entropy_contract(loss, gradient, np.ascontiguousarray(records["x"]), target)


def test_subclasses_of_arrays_and_read_only_arrays_are_legal(logits, target):
    logits.flags.writeable = False
    target.flags.writeable = False
    expected = fastloss.cross_entropy(logits, target)
    assert_same_bits(fastloss.cross_entropy(logits.view(np.memmap), target), expected)


# ---- what is left alone, and what is not allocated ----


# Liger #272, Unsloth #5002, Megatron PR #1594: logits overwritten behind the caller's back.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_logits_target_weight_and_bias_are_not_written(axis, dtype, rng):
    logits = rng.standard_normal((60, 60)).astype(DTYPES[dtype])
    acc = accumulation(logits.dtype)
    arguments = [logits, rng.integers(60, size=60), rng.random(60).astype(acc), rng.random(60).astype(acc)]
    before = [array.copy() for array in arguments]
    _, gradient = fastloss.cross_entropy(
        *arguments[:3], axis=axis, bias=arguments[3], softcap=5.0, label_smoothing=0.1, return_grad=True
    )
    for array, copy in zip(arguments, before, strict=True):
        assert_same_bits(array, copy)
        assert not np.shares_memory(array, gradient)


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LAYOUTS = {
    "contiguous": lambda x: x,
    "row stride": lambda x: x[:, :-1],
    "classes apart": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1, ::-1],
    "class axis in the middle": lambda x: x.reshape(4, 500, 500).transpose(0, 2, 1),
}


# transformers #30860, #38452: copies of bf16 logits in float32.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_makes_no_copy_of_the_logits(layout, dtype, rng):
    logits = LAYOUTS[layout](rng.standard_normal((1000, 1000)).astype(DTYPES[dtype]))
    target = rng.integers(logits.shape[1], size=logits.shape[:1] + logits.shape[2:])
    # float64 would be 8 MB, the logits in bfloat16 2 MB.
    assert peak_of(lambda: fastloss.cross_entropy(logits, target)) < 200_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_only_array_of_the_size_of_the_logits(layout, rng):
    logits = LAYOUTS[layout](rng.standard_normal((1000, 1000)).astype(np.float32))
    target = rng.integers(logits.shape[1], size=logits.shape[:1] + logits.shape[2:])
    peak = peak_of(lambda: fastloss.cross_entropy(logits, target, return_grad=True))
    assert peak < logits.nbytes + 200_000
