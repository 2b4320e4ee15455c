# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the CPU by tests/cuda_emulation: the same source, thread for thread, against the oracle.

Its exp is off by 2 units in the last place everywhere, as that of a GPU may be, and the bounds are those of the CPU path.
"""

import os

import numpy as np
import pytest

import reference
from binding import aligned_weight, tensor
from cuda_binding import DEVICE, STATISTICS, CudaCall, Expected, load_emulation, statistics, statistics_gradient
from helpers import (
    DEFAULT,
    DTYPES,
    accumulation,
    assert_cross_entropy_contract,
    assert_gradient_close,
    assert_loss_close,
    assert_same_bits,
    confident_slack,
    transform_extra,
)
from reference import Options
from rows import KINDS, logits_and_target

cuda = load_emulation()
INF = np.inf

# Around what a lane, a warp and a block take at a time, for each dtype.
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 257, 511, 513, 1023, 2048, 4097, 9001)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def order(request, monkeypatch):
    """The order in which the threads of a block run: what is not ordered by a barrier comes out wrong in one of them."""
    if request.param:
        monkeypatch.setenv("FASTLOSS_EMULATION_BACKWARDS", "1")


def poisoned(logits):
    return np.full_like(logits, np.nan)


def parts_of(logits, axis=-1):
    return cuda.plan(tensor(logits, axis), None, *DEVICE)[1]


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
    assert parts_of(logits) > 1
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
    assert parts_of(logits, axis=0) > 1
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


# ---- made by forward ----

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


# ---- statistics ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
@pytest.mark.parametrize("classes", [1, 30, 1000, 9000])
def test_statistics_are_those_of_the_oracle(classes, transformed, axis, dtype, rng):
    logits = (2 * rng.standard_normal((5, classes))).astype(DTYPES[dtype])
    logits[1, : classes // 2] = -INF
    logits[2, classes // 3] = 30
    ids = rng.integers(classes, size=(5, 3))
    bias = aligned_weight(rng.standard_normal(classes), logits)
    options = Options(temperature=0.8, softcap=50.0, bias=bias) if transformed else Options()
    z = options.transformed(logits)
    if transformed or classes == 1:
        z, logits = z[[0, 2, 3, 4]], logits[[0, 2, 3, 4]]
        ids = ids[[0, 2, 3, 4]]
    out, saved = statistics(cuda, laid_out(logits, axis), ids, options=options, axis=axis)
    expected = {name: reference.STATISTICS[name](z) for name in STATISTICS if name in reference.STATISTICS}
    expected["logprob"] = reference.log_prob(z, ids)
    unit = 2.0**-22 if accumulation(logits.dtype) == np.float32 else 2.0**-50
    slack = (confident_slack(reference.log_softmax(z), logits.dtype) + transform_extra(logits, options)[:, 0] * unit).max()
    with np.errstate(invalid="ignore"):
        spread = np.where(np.isfinite(z), np.abs(z - z.max(axis=-1, keepdims=True)), 0).max() * unit
    for name in ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob"):
        assert_loss_close(out[name], expected[name], logits.dtype, slack + spread)
    if not transformed:
        np.testing.assert_array_equal(out["argmax"], expected["argmax"])
        np.testing.assert_array_equal(out["rank"], reference.rank(z, ids))
    np.testing.assert_array_equal(saved[:, 2], 0)


def laid_out(logits, axis):
    return np.ascontiguousarray(logits.T) if axis == 0 else logits


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_and_rank_put_the_first_of_equals_first(dtype, axis, rng, order):
    logits = rng.integers(-2, 3, (40, 1234)).astype(DTYPES[dtype])
    ids = rng.integers(1234, size=(40, 2))
    out, _ = statistics(cuda, laid_out(logits, axis), ids, ("argmax", "rank"), axis=axis)
    z = reference.wide(logits)
    np.testing.assert_array_equal(out["argmax"], reference.argmax(z))
    np.testing.assert_array_equal(out["rank"], reference.rank(z, ids))


def test_argmax_of_a_row_shared_among_blocks_is_the_first(rng):
    logits = np.zeros((1, 200_000), np.float32)
    logits[0, [7, 100_000, 199_999]] = 3
    assert parts_of(logits) > 1
    assert statistics(cuda, logits, want=("argmax",))[0]["argmax"] == [7]
    logits[0, 7] = 0
    assert statistics(cuda, logits, want=("argmax",))[0]["argmax"] == [100_000]


def test_rows_without_a_normaliser_have_no_argmax_and_no_rank():
    logits = np.array([[np.nan, 1.0, 2.0], [-INF, -INF, -INF], [0.0, INF, 1.0], [0.0, 2.0, 1.0]], np.float32)
    out, _ = statistics(cuda, logits, np.array([[1], [1], [1], [2]]))
    np.testing.assert_array_equal(out["argmax"], [-1, -1, -1, 1])
    np.testing.assert_array_equal(out["rank"][:, 0], [-1, -1, -1, 1])
    for name in ("logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob"):
        np.testing.assert_array_equal(np.isnan(out[name]), [True, True, True, False])


def test_statistics_of_an_id_out_of_range_are_nan_and_no_rank(rng):
    logits = rng.standard_normal((3, 20)).astype(np.float32)
    out, _ = statistics(cuda, logits, np.array([[0, 20], [-1, 5], [3, 19]]))
    np.testing.assert_array_equal(np.isnan(out["logprob"]), [[False, True], [True, False], [False, False]])
    np.testing.assert_array_equal(out["rank"] < 0, [[False, True], [True, False], [False, False]])


@pytest.mark.parametrize("k", [1, 3, 40, 300])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_statistics_is_that_of_the_oracle(dtype, axis, k, rng, order):
    rows, classes = 4, 200
    logits = (2 * rng.standard_normal((rows, classes))).astype(DTYPES[dtype])
    ids = rng.integers(classes, size=(rows, k))  # more ids than classes: they occur again
    g = rng.standard_normal((rows, k))
    a, b, c, d = rng.standard_normal((4, rows))
    z = reference.wide(logits)
    _, saved = statistics(cuda, laid_out(logits, axis), want=("logsumexp",), axis=axis)
    coefficients = np.ascontiguousarray(np.stack([a, b, c, d], -1))
    out = statistics_gradient(
        cuda, laid_out(logits, axis), saved, coefficients, ids, g, poisoned(laid_out(logits, axis)), axis=axis
    )
    p, x = reference.softmax(z), reference.shifted(z)
    hits = np.zeros_like(z)
    for i in range(k):
        np.add.at(hits, (np.arange(rows), ids[:, i]), g[:, i])
    expected = p * (a[:, None] + b[:, None] * x + c[:, None] * p) + d[:, None] - hits
    scale = p * (np.abs(a)[:, None] + np.abs(b[:, None] * x) + np.abs(c)[:, None] * p) + np.abs(d)[:, None] + np.abs(hits)
    assert_gradient_close(np.moveaxis(out, axis, -1), expected, 2 * scale, reference.log_softmax(z), logits.dtype, flushed=10.0)


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


def test_device_that_is_not_there_is_refused():
    logits = np.zeros((2, 5), np.float32)
    with pytest.raises(RuntimeError, match="invalid device"):
        cuda.workspace_bytes((logits.ctypes.data, 0, (2, 5), (5, 1), 1), 7, 0)


def test_rows_along_too_many_axes_are_refused():
    logits = np.lib.stride_tricks.as_strided(np.zeros(32, np.float32), (2,) * 20, (4,) * 20)
    with pytest.raises(ValueError, match="more than 16"):
        CudaCall(cuda, logits, np.zeros((2,) * 19, np.int64), Options()).forward()
