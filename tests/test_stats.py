# SPDX-License-Identifier: Apache-2.0
"""`logit_stats`: every statistic against the oracle, on every instruction set."""

import functools

import numpy as np
import pytest

import binding
import fastloss
import reference
import rows
from fastloss import _cpu
from helpers import (
    DEFAULT,
    DTYPES,
    accumulation,
    assert_gradient_close,
    assert_loss_close,
    assert_same_bits,
    transform_extra,
)
from reference import Options

ALL = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")
FLOATS = ("logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob")
TRANSFORM = {"softcap": 15.0, "temperature": 0.7}
UNIT = {"float32": 2.0**-22, "float64": 2.0**-51}


def stat(name, logits, target=None, **options):
    return getattr(fastloss.logit_stats(logits, target, want=(name,), **options), name)


@functools.cache
def expected(name, kind, classes, dtype):
    return reference.STATISTICS[name](reference.wide(rows.logits_and_target(kind, classes, dtype)[0]))


@functools.cache
def entropy_slack(kind, classes, dtype):
    """sum p |log p| (1 + |log p|) 2^-22: what the bound of each probability allows the entropy."""
    z = reference.wide(rows.logits_and_target(kind, classes, dtype)[0])
    log_p = reference.log_softmax(z)
    distance = np.where(np.isfinite(log_p), np.abs(log_p), 0)
    return (reference.softmax(z) * distance * (1 + distance)).sum(axis=-1) * UNIT[accumulation(DTYPES[dtype]).name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 128256])
@pytest.mark.parametrize("kind", rows.KINDS)
def test_logsumexp_is_within_a_few_ulp(kind, classes, dtype, isa):
    logits, _ = rows.logits_and_target(kind, classes, dtype)
    z = reference.wide(logits)
    # Where maximum and log of the sum cancel, their own size counts.
    slack = np.abs(z.max(axis=-1)) * UNIT[accumulation(logits.dtype).name] / 2
    assert_loss_close(stat("logsumexp", logits), expected("logsumexp", kind, classes, dtype), logits.dtype, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 128256])
@pytest.mark.parametrize("kind", rows.KINDS)
def test_entropy_is_within_the_bound(kind, classes, dtype, isa):
    logits, _ = rows.logits_and_target(kind, classes, dtype)
    actual = stat("entropy", logits)
    assert_loss_close(actual, expected("entropy", kind, classes, dtype), dtype, entropy_slack(kind, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 128256])
@pytest.mark.parametrize("kind", [kind for kind in rows.KINDS if kind != "masked"])
def test_mean_logit_is_within_the_bound(kind, classes, dtype, isa):
    logits, _ = rows.logits_and_target(kind, classes, dtype)
    z = reference.wide(logits)
    slack = np.abs(reference.shifted(z)).mean(axis=-1) * UNIT[accumulation(logits.dtype).name]
    assert_loss_close(stat("mean_logit", logits), expected("mean_logit", kind, classes, dtype), dtype, slack)


def test_mean_logit_of_a_masked_row_is_minus_inf(isa):
    logits = np.array([[0.0, -np.inf, 3.0]], np.float32)
    assert stat("mean_logit", logits)[0] == -np.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 128256])
@pytest.mark.parametrize("kind", rows.KINDS)
@pytest.mark.parametrize("name", ["sum_sq_prob", "max_prob"])
def test_sums_of_probabilities_are_within_the_bound(name, kind, classes, dtype, isa):
    logits, _ = rows.logits_and_target(kind, classes, dtype)
    exact = expected(name, kind, classes, dtype)
    p = reference.softmax(reference.wide(logits))
    log_p = np.where(p > 0, np.abs(np.log(np.where(p > 0, p, 1))), 0)
    # Each probability is within (1 + |log p|) 2^-22, and the square of one twice that.
    distance = (p**2 * log_p).sum(axis=-1) / (p**2).sum(axis=-1)
    slack = exact * 2 * (1 + distance) * UNIT[accumulation(logits.dtype).name]
    assert_loss_close(stat(name, logits), exact, dtype, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 1000, 128256])
@pytest.mark.parametrize("kind", rows.KINDS)
def test_logprob_is_minus_the_loss_to_the_last_bit(kind, classes, dtype, isa):
    logits, target = rows.logits_and_target(kind, classes, dtype)
    loss = fastloss.cross_entropy(logits, target, axis=-1, reduction="none")
    np.testing.assert_array_equal(stat("logprob", logits, target), -loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 1000, 4097, 20000])
def test_argmax_is_the_first_maximum(classes, dtype, isa, rng):
    # Few different values, so that the maximum is met more than once.
    logits = rng.integers(-5, 6, (20, classes)).astype(DTYPES[dtype])
    np.testing.assert_array_equal(stat("argmax", logits), np.argmax(logits.astype(np.float64), axis=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 1000, 4097, 20000])
def test_rank_is_the_place_in_a_stable_descending_sort(classes, dtype, isa, rng):
    logits = rng.integers(-5, 6, (10, classes)).astype(DTYPES[dtype])
    target = rng.integers(classes, size=10)
    order = np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")
    place = np.argmax(order == target[:, None], axis=-1)
    np.testing.assert_array_equal(stat("rank", logits, target), place)


def test_rank_is_zero_exactly_where_the_target_is_the_argmax(isa, rng):
    logits = rng.integers(-2, 3, (500, 6)).astype(np.float32)
    target = rng.integers(6, size=500)
    stats = fastloss.logit_stats(logits, target, want=("argmax", "rank"))
    np.testing.assert_array_equal(stats.rank == 0, stats.argmax == target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_sees_through_a_transform_that_makes_ties(dtype, isa):
    # tanh saturates: 400 and 300 become the same z, and the earlier one comes first.
    logits = np.array([[300.0, 400.0, -1.0]], DTYPES[dtype])
    stats = fastloss.logit_stats(logits, np.array([1]), want=("argmax", "rank"), softcap=1.0)
    assert stats.argmax[0] == 0
    assert stats.rank[0] == 1


@pytest.mark.parametrize("bad", [-np.inf, np.nan, np.inf])
def test_row_without_a_normaliser_has_nan_statistics_and_no_argmax(bad, isa, rng):
    logits = rng.standard_normal((3, 5000)).astype(np.float32)
    logits[1] = bad
    stats = fastloss.logit_stats(logits, np.array([1, 2, 3]), want=ALL)
    for name in ("logprob", *FLOATS):
        np.testing.assert_array_equal(np.isnan(getattr(stats, name)), [False, True, False])
    assert stats.argmax[1] == stats.rank[1] == -1
    assert stats.argmax[0] >= 0
    assert stats.rank[2] >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [1, 2, 7])
def test_several_targets_a_row_are_those_of_one_at_a_time(several, dtype, isa, rng):
    logits = rng.standard_normal((6, 5000)).astype(DTYPES[dtype])
    target = rng.integers(5000, size=(6, several))
    target[0] = target[0, 0]
    together = fastloss.logit_stats(logits, target, want=("logprob", "rank"))
    for k in range(several):
        alone = fastloss.logit_stats(logits, target[:, k], want=("logprob", "rank"))
        assert_same_bits(together.logprob[:, k], alone.logprob)
        assert_same_bits(together.rank[:, k], alone.rank)


@pytest.mark.parametrize("name", ALL)
def test_statistic_alone_has_the_bits_of_all_together(name, isa, rng):
    logits = rng.standard_normal((6, 5000)).astype(np.float32)
    target = rng.integers(5000, size=6)
    assert_same_bits(stat(name, logits, target), getattr(fastloss.logit_stats(logits, target, want=ALL), name))


@pytest.mark.parametrize("name", FLOATS)
def test_statistics_are_of_the_transformed_logits(name, isa, rng):
    logits = (10 * rng.standard_normal((4, 3000))).astype(np.float32)
    bias = rng.standard_normal(3000).astype(np.float32)
    options = Options(bias=bias, **TRANSFORM)
    z = options.transformed(logits)
    slack = transform_extra(logits, options).max(axis=-1) * UNIT["float32"] * (2 + np.abs(reference.log_sum_exp(z)))
    assert_loss_close(stat(name, logits, bias=bias, **TRANSFORM), reference.STATISTICS[name](z), np.float32, slack)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_axis_is_the_class_axis(axis, isa, rng):
    logits = rng.standard_normal((5, 6, 7)).astype(np.float32)
    moved = np.moveaxis(logits, axis, -1)
    target = rng.integers(moved.shape[-1], size=moved.shape[:-1])
    actual = fastloss.logit_stats(logits, target, axis=axis, want=ALL)
    expected_stats = fastloss.logit_stats(np.ascontiguousarray(moved), target, want=ALL)
    for name in ALL:
        assert_same_bits(getattr(actual, name), getattr(expected_stats, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_come_in_the_accumulation_type_and_places_in_int64(dtype):
    stats = fastloss.logit_stats(np.zeros((2, 3), DTYPES[dtype]), np.array([0, 1]), want=ALL)
    for name in ("logprob", *FLOATS):
        assert getattr(stats, name).dtype == accumulation(DTYPES[dtype])
    assert stats.argmax.dtype == stats.rank.dtype == np.int64


def test_statistics_of_one_row_without_a_batch_are_numbers():
    stats = fastloss.logit_stats(np.array([0.0, 1.0], np.float32), 1, want=ALL)
    for name in ALL:
        assert np.shape(getattr(stats, name)) == ()


def test_statistics_of_no_rows_are_empty():
    stats = fastloss.logit_stats(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), want=ALL)
    for name in ALL:
        assert getattr(stats, name).shape == (0,)


# ---- the one gradient kernel, through the module itself ----


def gradient_of(name, logits, upstream, options=DEFAULT):
    """The gradient of sum_i upstream_i * statistic_i, by the coefficients of DESIGN section 1."""
    count = len(logits)
    saved = np.empty((count, binding.saved_width(logits.shape[-1])))
    entropy, squares, top = (np.empty(count, accumulation(logits.dtype)) for _ in range(3))
    argmax = np.empty(count, np.int64)
    transform = (options.temperature, options.softcap or 0.0, binding.address(options.bias))
    out = (0, 0, entropy.ctypes.data, 0, squares.ctypes.data, top.ctypes.data, argmax.ctypes.data, 0)
    _cpu.statistics(binding.tensor(logits, 1), None, 0, transform, out, saved.ctypes.data)
    a, b, c, d = np.zeros((4, count))
    target, g, k = None, 0, 0
    if name == "logsumexp":
        a += upstream
    elif name == "entropy":
        a += upstream * (np.log1p(saved[:, 1]) - entropy)
        b -= upstream
    elif name == "mean_logit":
        d += upstream / logits.shape[1]
    elif name == "sum_sq_prob":
        a -= 2 * upstream * squares
        c += 2 * upstream
    else:
        a -= upstream * top
        target_g = -upstream * top
        target, g, k = (argmax.ctypes.data, 8), target_g.ctypes.data, 1
    coefficients = np.ascontiguousarray(np.stack([a, b, c, d], axis=1))
    gradient = np.empty_like(logits)
    _cpu.gradient(
        binding.tensor(logits, 1),
        saved.ctypes.data,
        coefficients.ctypes.data,
        target,
        k,
        g,
        transform,
        binding.tensor(gradient, 1),
    )
    return gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", reference.STATISTIC_GRADIENTS)
def test_gradient_of_statistic_is_within_the_bound(name, transformed, dtype, isa, rng):
    logits = (3 * rng.standard_normal((4, 4500))).astype(DTYPES[dtype])
    options = Options(**(TRANSFORM if transformed else {}))
    upstream = np.array([1.0, -2.5, 0.0, 0.3])
    z, slope = options.transformed(logits), options.slope(logits)
    p, log_p = reference.softmax(z), reference.log_softmax(z)
    exact = upstream[:, None] * slope * reference.STATISTIC_GRADIENTS[name](z)
    # What each gradient is a difference of.
    terms = {
        "logsumexp": p,
        "entropy": p * (2 * np.abs(log_p) + 2 * reference.entropy(z)[:, None]),
        "mean_logit": np.full_like(p, 1 / z.shape[1]),
        "sum_sq_prob": 2 * p * (p + reference.sum_sq_prob(z)[:, None]),
        "max_prob": reference.max_prob(z)[:, None] * (p + reference.one_hot(np.argmax(z, axis=-1), z.shape[1])),
    }[name]
    scale = np.abs(upstream)[:, None] * slope * terms
    extra = transform_extra(logits, options)
    assert_gradient_close(gradient_of(name, logits, upstream, options), exact, scale, log_p, dtype, extra, flushed=10.0)


def test_duplicate_targets_add_up_in_the_gradient(isa, rng):
    logits = rng.standard_normal((2, 5000)).astype(np.float32)
    ids = np.array([[7, 7, 4999], [4096, 0, 4096]])
    upstream = np.array([[1.0, 2.0, -0.5], [0.25, 1.0, 3.0]])
    saved = np.empty((2, binding.saved_width(logits.shape[-1])))
    _cpu.statistics(binding.tensor(logits, 1), None, 0, (1.0, 0.0, 0), (0,) * 8, saved.ctypes.data)
    coefficients, g = np.zeros((2, 4)), np.ascontiguousarray(-upstream)
    coefficients[:, 0] = -upstream.sum(axis=1)
    gradient = np.empty_like(logits)
    _cpu.gradient(
        binding.tensor(logits, 1),
        saved.ctypes.data,
        coefficients.ctypes.data,
        (ids.ctypes.data, 8),
        3,
        g.ctypes.data,
        (1.0, 0.0, 0),
        binding.tensor(gradient, 1),
    )
    z = reference.wide(logits)
    exact = reference.log_prob_gradient(z, ids, upstream)
    scale = np.abs(upstream).sum(axis=1)[:, None] * (
        reference.softmax(z) + sum(reference.one_hot(ids[:, k], 5000) for k in range(3))
    )
    assert_gradient_close(gradient, exact, scale, reference.log_softmax(z), np.float32, flushed=4.0)
