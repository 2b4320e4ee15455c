# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the CPU by tests/cuda_emulation: the same source, thread for thread, against the oracle.

Its exp is off by 2 units in the last place everywhere, as that of a GPU may be, and the bounds are those of the CPU path.
"""

import os

import numpy as np
import pytest

import reference
from binding import aligned_weight
from cuda_binding import CudaCall, load_emulation, parts_of, poisoned
from helpers import DEFAULT, DTYPES, assert_cross_entropy_contract, assert_gradient_close, assert_same_bits
from reference import Options
from rows import KINDS, logits_and_target

cuda = load_emulation()
INF = np.inf

# Around what a lane, a warp and a block take at a time, for each dtype.
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 257, 511, 513, 1023, 2048, 4097, 9001)


def check(logits, target, options=DEFAULT, axis=-1, reduction="mean", denominator=None):
    """Loss and gradient, in two trips and in one, against the oracle."""
    rows = reference.as_rows(logits, axis)
    flat_target = reference.as_rows(target, axis) if reference.is_soft(target) else target.reshape(-1)
    call = CudaCall(cuda, logits, target, options, axis, reduction, denominator)
    two_trips = call.backward(poisoned(logits)) if call.forward() is not None else None
    one_trip = CudaCall(cuda, logits, target, options, axis, reduction, denominator)
    gradient = poisoned(logits)
    one_trip.forward(gradient)
    for loss, grad in ((call.loss, two_trips), (one_trip.loss, gradient)):
        assert_cross_entropy_contract(loss, reference.as_rows(grad, axis), rows, flat_target, options, reduction, denominator)
    return call


# ---- dtypes, lengths, alignment ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", LENGTHS)
def test_rows_of_awkward_lengths_keep_the_contract(classes, dtype, rng, order):
    logits = (3 * rng.standard_normal((9, classes))).astype(DTYPES[dtype])
    check(logits, rng.integers(classes, size=9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", range(9))
def test_rows_that_begin_anywhere_keep_the_contract(start, dtype, rng):
    base = rng.standard_normal((5, 1100)).astype(DTYPES[dtype])
    check(base[:, start : start + 1001], rng.integers(1001, size=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [100, 5000])
def test_rows_of_every_kind_keep_the_contract(classes, kind, dtype, order):
    logits, target = logits_and_target(kind, classes, dtype)
    check(np.array(logits), target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_shared_among_blocks_keep_the_contract(dtype, rng):
    logits = (3 * rng.standard_normal((2, 150_000))).astype(DTYPES[dtype])
    target = np.array([149_999, 70_000])
    assert parts_of(cuda, logits) > 1
    check(logits, target)
    check(logits, target, Options(label_smoothing=0.1, softcap=20.0), reduction="none")
    logits[0, :140_000] = -INF
    check(logits, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_beside_other_rows_writes_nothing_else(dtype, rng):
    logits = rng.standard_normal((6, 777)).astype(DTYPES[dtype])
    room = np.full((6, 800), 5, DTYPES[dtype])
    call = CudaCall(cuda, logits, rng.integers(777, size=6), Options())
    call.forward()
    call.backward(room[:, 11:788])
    assert np.all(room[:, :11] == 5)
    assert np.all(room[:, 788:] == 5)


# ---- layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 21, 50), 1), ((2, 300, 5, 7), 1), ((2, 150, 20, 40), 1), ((40, 33), 0), ((2, 3, 4, 65), 2), ((5, 1, 3), 1)],
)
def test_class_axis_anywhere_keeps_the_contract(shape, axis, dtype, rng, order):
    logits = (2 * rng.standard_normal(shape)).astype(DTYPES[dtype])
    rows = shape[:axis] + shape[axis + 1 :]
    check(logits, rng.integers(shape[axis], size=rows), axis=axis)
    check(logits, rng.integers(shape[axis], size=rows), Options(softcap=3.0, label_smoothing=0.2), axis=axis)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_keep_the_contract(dtype, rng):
    base = rng.standard_normal((8, 6, 90)).astype(DTYPES[dtype])
    for logits, axis in ((base[::2, ::-1, ::3], 2), (base.transpose(2, 0, 1)[5:], 0), (base[:, ::2].swapaxes(0, 2), 0)):
        rows = logits.shape[:axis] + logits.shape[axis + 1 :]
        call = CudaCall(cuda, logits, rng.integers(logits.shape[axis], size=rows), Options(), axis)
        gradient = np.full(logits.shape, np.nan, logits.dtype)  # laid out otherwise than the logits
        call.forward()
        call.backward(gradient)
        flat = reference.as_rows(logits, axis)
        assert_cross_entropy_contract(call.loss, reference.as_rows(gradient, axis), flat, call.target.reshape(-1))


def test_few_rows_with_strided_classes_are_shared_among_blocks(rng):
    logits = rng.standard_normal((20_000, 3)).astype(np.float32)
    assert parts_of(cuda, logits, axis=0) > 1
    check(logits, rng.integers(20_000, size=3), axis=0)


# ---- in place ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(12, 3001), (1, 150_000)])
def test_gradient_over_the_logits_has_the_same_bits(rows, classes, dtype, rng, order):
    logits = rng.standard_normal((rows, classes)).astype(DTYPES[dtype])
    target = rng.integers(classes, size=rows)
    call = CudaCall(cuda, logits, target, Options(z_loss=1e-3))
    call.forward()
    fresh = call.backward(poisoned(logits))
    assert_same_bits(call.backward(logits), fresh)


def test_one_trip_over_the_logits_keeps_the_contract(rng, order):
    logits = rng.standard_normal((12, 3001)).astype(np.float32)
    target = rng.integers(3001, size=12)
    before = logits.copy()
    call = CudaCall(cuda, logits, target, Options())
    call.forward(logits)
    assert_cross_entropy_contract(call.loss, logits, before, target)


# ---- options ----


def all_options(dtype, classes, rng):
    weight = aligned_weight(rng.uniform(0, 2, classes), np.zeros(0, dtype))
    bias = aligned_weight(rng.standard_normal(classes), np.zeros(0, dtype))
    return {
        "weight": Options(weight=weight),
        "smoothing": Options(label_smoothing=0.1),
        "weight and smoothing": Options(weight=weight, label_smoothing=0.3),
        "z-loss": Options(z_loss=1e-2),
        "temperature": Options(temperature=0.7),
        "softcap": Options(softcap=5.0),
        "bias": Options(bias=bias),
        "all": Options(weight, -100, 0.1, 1e-3, 1.3, 10.0, bias),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", all_options(np.float32, 1, np.random.default_rng(0)))
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options_keep_the_contract(reduction, name, dtype, rng):
    options = all_options(DTYPES[dtype], 700, rng)[name]
    logits = (2 * rng.standard_normal((7, 700))).astype(DTYPES[dtype])
    target = rng.integers(700, size=7).astype(np.int32)
    target[3] = -100
    check(logits, target, options, reduction=reduction)


@pytest.mark.parametrize("name", all_options(np.float32, 1, np.random.default_rng(0)))
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_soft_targets_keep_the_contract(dtype, target_dtype, name, rng):
    if dtype not in DTYPES:
        pytest.skip("needs ml_dtypes")
    options = all_options(DTYPES[dtype], 300, rng)[name]
    logits = (2 * rng.standard_normal((6, 300))).astype(DTYPES[dtype])
    target = rng.dirichlet(np.ones(300), 6).astype(DTYPES[target_dtype])
    call = check(logits, target, options)
    out = call.soft_target_gradient(poisoned(target))
    expected = reference.soft_target_gradient(logits, target, options)
    tolerance = {"float32": 1e-6, "float64": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[target_dtype]
    np.testing.assert_allclose(reference.wide(out), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_soft_targets_may_lie_otherwise_than_the_logits(rng):
    logits = rng.standard_normal((3, 50, 4)).astype(np.float32)
    target = np.ascontiguousarray(rng.dirichlet(np.ones(50), (3, 4)).astype(np.float32)).swapaxes(1, 2)
    check(logits, target, axis=1)


def test_upstream_gradients_scale_each_row(rng):
    logits = rng.standard_normal((5, 90)).astype(np.float32)
    target = rng.integers(90, size=5)
    upstream = np.array([0.0, 1.0, -2.5, 1e-3, 1e3], np.float32)
    call = CudaCall(cuda, logits, target, Options(), reduction="none")
    call.forward()
    gradient = call.backward(poisoned(logits), upstream)
    arguments = (logits, target, Options(), "none", None, upstream)
    scale = reference.cross_entropy_gradient_scale(*arguments)
    log_p = reference.log_softmax(reference.wide(logits))
    expected = reference.cross_entropy_gradient(*arguments)
    assert_gradient_close(gradient, expected, scale, log_p, np.float32, flushed=np.abs(upstream)[:, None])


def test_denominator_divides_the_sum(rng):
    logits = rng.standard_normal((5, 90)).astype(np.float32)
    check(logits, rng.integers(90, size=5), denominator=17.0)


def test_mean_of_many_rows_is_that_of_the_oracle(rng):
    logits = rng.standard_normal((1500, 3)).astype(np.float32)  # more than a block sums
    target = rng.integers(3, size=1500)
    target[::7] = -100
    weight = np.array([0.5, 1.0, 2.0], np.float32)
    check(logits, target, Options(weight=weight))


# ---- edges ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocked", [1, 64, 1000, 4999])
def test_leading_block_of_minus_inf_is_finite(blocked, dtype, rng):
    logits = rng.standard_normal((2, 5000)).astype(DTYPES[dtype])
    logits[:, :blocked] = -INF
    call = check(logits, np.array([4999, blocked]), reduction="none")
    assert np.all(np.isfinite(call.loss))


def test_target_of_logit_minus_inf_has_loss_inf_and_finite_gradient():
    logits = np.array([[-INF, 0.5, 1.0], [0.0, 0.0, -INF]], np.float32)
    call = check(logits, np.array([0, 2]), reduction="none")
    assert np.all(call.loss == INF)


def test_masked_class_of_weight_zero_is_left_out_of_smoothing():
    logits = np.array([[0.0, -INF, 1.0]], np.float32)
    options = Options(weight=np.array([1.0, 0.0, 1.0], np.float32), label_smoothing=0.1)
    assert np.isfinite(check(logits, np.array([0]), options, reduction="none").loss[0])


def test_smoothing_of_one_over_a_masked_class_of_a_soft_target_is_inf():
    call = CudaCall(cuda, np.array([[0.0, -INF]], np.float32), np.full((1, 2), 0.5, np.float32), Options(label_smoothing=1.0))
    call.forward()
    assert call.loss == INF


@pytest.mark.parametrize("rows", [1, 40], ids=["rows shared", "warps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_targets_that_add_up_to_nothing_count_all_the_same(dtype, rows, rng):
    logits = rng.standard_normal((rows, 70_000)).astype(DTYPES[dtype])
    signed = np.zeros_like(logits)
    signed[:, [40_000, 69_000]] = [1.0, -1.0]
    call = CudaCall(cuda, logits, signed, Options(), reduction="none")
    call.forward()
    expected = reference.wide(logits)[:, 69_000] - reference.wide(logits)[:, 40_000]
    np.testing.assert_allclose(call.loss, expected, rtol=0, atol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("options", [Options(), Options(softcap=5.0), Options(label_smoothing=0.1)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("content", ["only -inf", "+inf", "two +inf", "NaN", "NaN at the target", "+inf and -inf"])
def test_row_without_a_normaliser_is_nan_and_its_neighbours_are_not(content, dtype, axis, options, rng):
    if options.softcap and content != "NaN":
        pytest.skip("a softcap makes infinities finite")
    logits = rng.standard_normal((5, 1000)).astype(DTYPES[dtype])
    target = rng.integers(1000, size=5)
    place = (target[2] + 500) % 1000
    everywhere = slice(None)
    for where, value in {
        "only -inf": [(everywhere, -INF)],
        "+inf": [(place, INF)],
        "two +inf": [(place, INF), (place - 7, INF)],
        "NaN": [(place, np.nan)],
        "NaN at the target": [(target[2], np.nan)],
        "+inf and -inf": [(everywhere, -INF), (place, INF)],
    }[content]:
        logits[2, where] = value
    logits = np.ascontiguousarray(logits.T) if axis == 0 else logits
    call = CudaCall(cuda, logits, target, options, axis, "none")
    call.forward()
    gradient = np.moveaxis(call.backward(np.zeros_like(logits)), axis, -1).astype(np.float64)
    one_trip = np.zeros_like(logits)
    CudaCall(cuda, logits, target, options, axis, "none").forward(one_trip)
    for grad in (gradient, np.moveaxis(one_trip, axis, -1).astype(np.float64)):
        assert np.all(np.isnan(grad[2]))
        assert np.all(np.isfinite(grad[[0, 1, 3, 4]]))
    np.testing.assert_array_equal(np.isnan(call.loss), np.arange(5) == 2)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_row_is_zero_whatever_it_holds(dtype, axis, rng):
    logits = rng.standard_normal((6, 600)).astype(DTYPES[dtype])
    logits[1], logits[2], logits[3, 17] = np.nan, -INF, INF
    target = np.array([5, -100, -100, -100, 7, -100])
    logits = np.ascontiguousarray(logits.T) if axis == 0 else logits
    call = CudaCall(cuda, logits, target, Options(), axis, "none")
    call.forward()
    gradient = np.moveaxis(call.backward(poisoned(logits)), axis, -1)
    ignored = target == -100
    assert np.all(call.loss[ignored] == 0)
    assert np.all(call.saved[ignored] == 0)
    assert np.all(gradient[ignored] == 0)
    assert np.all(call.loss[~ignored] > 0)


def test_class_id_as_ignore_index_is_not_counted(rng):
    logits = rng.standard_normal((8, 10)).astype(np.float32)
    check(logits, np.array([0, 1, 2, 0, 3, 0, 4, 5]), Options(ignore_index=0, label_smoothing=0.2))


def test_mean_of_nothing_but_ignored_rows_is_nan_and_its_gradient_zero():
    logits = np.ones((3, 4), np.float32)
    call = check(logits, np.full(3, -100))
    assert np.isnan(call.loss)
    assert call.scale == 0
    call = check(logits, np.full(3, -100), denominator=7.0)
    assert call.loss == 0


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)])
def test_no_rows_give_a_nan_mean_and_a_zero_sum(shape):
    logits = np.zeros(shape, np.float32)
    target = np.zeros((shape[0], *shape[2:]), np.int64)
    assert np.isnan(CudaCall(cuda, logits, target, Options(), 1).forward())
    assert CudaCall(cuda, logits, target, Options(), 1, "sum").forward() == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_padding_never_leaks_through_softcap(dtype, axis):
    for classes in (1, 3, 33, 513, 4097):
        logits = np.full((2, classes), -3000.0, dtype)
        logits[:, 0] = -2000
        logits = np.ascontiguousarray(logits.T) if axis == 0 else logits
        check(logits, np.array([0, classes - 1]), Options(softcap=1000.0), axis=axis, reduction="none")


# ---- ids out of range ----


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31), 2**40])
@pytest.mark.parametrize("axis", [0, 1])
def test_id_out_of_range_is_nan_in_its_row_alone(axis, bad, rng):
    logits = rng.standard_normal((4, 50)).astype(np.float32)
    logits = np.ascontiguousarray(logits.T) if axis == 0 else logits
    target = np.array([3, bad, 49, 0])
    weight = np.ones(50, np.float32)
    for options in (Options(), Options(weight=weight, label_smoothing=0.1)):
        call = CudaCall(cuda, logits, target, options, axis, "none")
        call.forward()
        gradient = np.moveaxis(call.backward(np.zeros_like(logits)), axis, -1)
        np.testing.assert_array_equal(np.isnan(call.loss), [False, True, False, False])
        np.testing.assert_array_equal(np.isnan(gradient).all(axis=-1), [False, True, False, False])
        np.testing.assert_array_equal(np.isnan(gradient).any(axis=-1), [False, True, False, False])
        assert np.isnan(CudaCall(cuda, logits, target, options, axis).forward())


# ---- the module ----


def test_results_do_not_change_from_run_to_run(rng):
    logits = rng.standard_normal((30, 3000)).astype(np.float32)
    target = rng.integers(3000, size=30)
    first = CudaCall(cuda, logits, target, Options(label_smoothing=0.1))
    first.forward()
    os.environ["FASTLOSS_EMULATION_BACKWARDS"] = "1"
    try:
        second = CudaCall(cuda, logits, target, Options(label_smoothing=0.1))
        second.forward()
    finally:
        del os.environ["FASTLOSS_EMULATION_BACKWARDS"]
    assert_same_bits(first.loss, second.loss)
    assert_same_bits(first.saved, second.saved)


def test_gradient_of_another_dtype_is_refused(rng):
    logits = rng.standard_normal((2, 5)).astype(np.float32)
    call = CudaCall(cuda, logits, np.array([1, 2]), Options())
    call.forward()
    with pytest.raises(ValueError, match="dtype of the logits"):
        call.backward(np.zeros((2, 5)))


def test_device_that_is_not_the_current_one_is_refused():
    logits = np.zeros((2, 5), np.float32)
    with pytest.raises(ValueError, match="current CUDA device"):
        cuda.workspace_bytes((logits.ctypes.data, 0, (2, 5), (5, 1), 1), 7, 0)


def test_rows_along_too_many_axes_are_refused():
    logits = np.lib.stride_tricks.as_strided(np.zeros(32, np.float32), (2,) * 20, (4,) * 20)
    with pytest.raises(ValueError, match="more than 16"):
        CudaCall(cuda, logits, np.zeros((2,) * 19, np.int64), Options()).forward()
