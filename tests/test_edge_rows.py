# SPDX-License-Identifier: Apache-2.0
"""Rows at the edge: -inf, +inf, NaN, one class, no rows, ignored rows; and that softcap and padding do not leak."""

import numpy as np
import pytest

import fastloss
import reference
from helpers import AWKWARD_LENGTHS, DTYPES, accumulation, assert_cross_entropy_contract, assert_loss_close, bfloat16
from reference import Options

INF = np.inf


def row_losses(logits, target, **options):
    return fastloss.cross_entropy(logits, target, axis=-1, reduction="none", return_grad=True, **options)


# ---- -inf ----


# flash-attention #1930: a leading block of -inf turned the online maximum into NaN.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocked", [1, 64, 4095, 4096, 4097, 8192, 9999])
def test_leading_block_of_minus_inf_is_finite(blocked, dtype, isa, rng):
    logits = rng.standard_normal((2, 10000)).astype(DTYPES[dtype])
    logits[:, :blocked] = -INF
    target = np.array([9999, blocked])
    loss, gradient = row_losses(logits, target)
    assert np.all(np.isfinite(loss))
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_inf_between_the_other_logits_has_gradient_zero(dtype, isa, rng):
    logits = rng.standard_normal((3, 9000)).astype(DTYPES[dtype])
    masked = rng.random(logits.shape) < 0.5
    masked[:, 0] = False
    logits[masked] = -INF
    target = np.zeros(3, np.int64)
    loss, gradient = row_losses(logits, target)
    assert np.all(gradient[masked] == 0)
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_of_logit_minus_inf_has_loss_inf_and_finite_gradient(dtype, isa):
    logits = np.array([[-INF, 0.5, 1.0], [0.0, 0.0, -INF]], DTYPES[dtype])
    target = np.array([0, 2])
    loss, gradient = row_losses(logits, target)
    assert np.all(loss == INF)
    assert np.all(np.isfinite(gradient.astype(np.float64)))
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_class_that_is_not_minus_inf_has_loss_zero(dtype, isa):
    logits = np.full((1, 5000), -INF, DTYPES[dtype])
    logits[0, 4200] = 3
    loss, gradient = row_losses(logits, np.array([4200]))
    assert loss[0] == 0
    assert np.all(gradient == 0)


def test_smoothing_over_a_masked_class_is_inf_as_its_formula(isa):
    logits = np.array([[0.0, -INF, 1.0]], np.float32)
    loss, gradient = row_losses(logits, np.array([0]), label_smoothing=0.1)
    assert loss[0] == INF
    assert np.all(np.isfinite(gradient))


def test_masked_class_of_weight_zero_is_left_out_of_smoothing(isa):
    logits = np.array([[0.0, -INF, 1.0]], np.float32)
    weight = np.array([1.0, 0.0, 1.0], np.float32)
    target = np.array([0])
    loss, gradient = row_losses(logits, target, weight=weight, label_smoothing=0.1)
    options = Options(weight=weight, label_smoothing=0.1)
    assert np.isfinite(loss[0])
    assert_cross_entropy_contract(loss, gradient, logits, target, options, "none")


def test_masked_class_of_soft_target_zero_is_left_out(isa):
    logits = np.array([[0.0, -INF, 1.0]], np.float32)
    target = np.array([[0.25, 0.0, 0.75]], np.float32)
    loss, gradient = row_losses(logits, target)
    assert np.isfinite(loss[0])
    assert_cross_entropy_contract(loss, gradient, logits, target, reduction="none")


def test_smoothing_of_one_over_a_masked_class_of_a_soft_target_is_inf_as_its_formula(isa):
    logits = np.array([[0.0, -INF]], np.float32)
    loss, gradient = row_losses(logits, np.array([[0.5, 0.5]], np.float32), label_smoothing=1.0)
    assert loss[0] == INF
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_and_weights_that_add_up_to_nothing_count_all_the_same(dtype, axis, isa, rng):
    """Their sum is 0 in the second block of classes, and in all; what they are multiplied with differs."""
    logits = rng.standard_normal((4, 9000)).astype(DTYPES[dtype])
    signed = np.zeros((4, 9000), DTYPES[dtype])
    signed[:, [10, 5000, 6000, 8999]] = [[0.0, 0.5, -0.5, 0.0], [0.5, 1.0, -1.0, -0.5], [1.0, 0.25, -0.25, 0.0], [0.0] * 4]
    laid_out = [array if axis == 1 else np.ascontiguousarray(array.T) for array in (logits, signed)]
    z = reference.wide(logits)
    gap = np.log(np.exp(z).sum(1, keepdims=True)) - z
    loss = fastloss.cross_entropy(*laid_out, axis=axis, reduction="none")
    np.testing.assert_allclose(loss, (reference.wide(signed) * gap).sum(1), rtol=1e-5, atol=1e-5)
    weight, target = signed[1].astype(np.float32), np.zeros(4, np.int64)
    loss = fastloss.cross_entropy(laid_out[0], target, weight, axis=axis, label_smoothing=0.5, reduction="none")
    np.testing.assert_allclose(loss, 0.5 / 9000 * (weight * gap).sum(1), rtol=1e-4, atol=1e-7)


def test_bias_of_minus_inf_masks_its_class(isa, rng):
    logits = rng.standard_normal((2, 300)).astype(np.float32)
    bias = np.where(np.arange(300) % 2, -INF, 0).astype(np.float32)
    loss, gradient = row_losses(logits, np.array([0, 2]), bias=bias)
    assert np.all(gradient[:, 1::2] == 0)
    alone, _ = row_losses(np.ascontiguousarray(logits[:, ::2]), np.array([0, 1]))
    assert_loss_close(loss, reference.wide(alone), np.float32)


# ---- rows without a normaliser ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 100, 9000])
@pytest.mark.parametrize("content", ["only -inf", "+inf", "NaN", "NaN at the target", "NaN and +inf", "+inf and -inf"])
def test_row_without_a_normaliser_is_nan_and_its_neighbours_are_not(content, classes, dtype, isa, rng):
    logits = rng.standard_normal((5, classes)).astype(DTYPES[dtype])
    target = rng.integers(classes, size=5)
    place = (target[2] + classes // 2) % classes
    if content == "only -inf":
        logits[2] = -INF
    elif content == "+inf":
        logits[2, place] = INF
    elif content == "NaN":
        logits[2, place] = np.nan
    elif content == "NaN at the target":
        logits[2, target[2]] = np.nan
    elif content == "NaN and +inf":
        logits[2, place] = INF
        logits[2, target[2]] = np.nan
    else:
        logits[2] = -INF
        logits[2, place] = INF
    loss, gradient = row_losses(logits, target)
    assert np.isnan(loss[2])
    assert np.all(np.isnan(gradient[2].astype(np.float64)))
    others = [0, 1, 3, 4]
    expected_loss, expected_gradient = row_losses(logits[others], target[others])
    np.testing.assert_array_equal(loss[others], expected_loss)
    np.testing.assert_array_equal(gradient[others], expected_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_of_a_nan_row_are_untouched_where_rows_lie_side_by_side(dtype, isa, rng):
    logits = rng.standard_normal((2, 50, 30)).astype(DTYPES[dtype])
    logits[0, 7, 3] = np.nan
    target = rng.integers(50, size=(2, 30))
    loss, gradient = fastloss.cross_entropy(logits, target, reduction="none", return_grad=True)
    wrong = np.zeros((2, 30), np.bool_)
    wrong[0, 3] = True
    np.testing.assert_array_equal(np.isnan(loss), wrong)
    np.testing.assert_array_equal(np.isnan(gradient.astype(np.float64)).any(axis=1), wrong)


def test_mean_over_a_nan_row_is_nan(isa):
    logits = np.array([[0.0, np.nan], [0.0, 1.0]], np.float32)
    assert np.isnan(fastloss.cross_entropy(logits, np.array([0, 1])))


# ---- ignored rows ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_row_is_zero_whatever_it_holds(dtype, isa, rng):
    logits = rng.standard_normal((6, 5000)).astype(DTYPES[dtype])
    logits[1] = np.nan
    logits[2] = -INF
    logits[3, 17] = INF
    target = np.array([5, -100, -100, -100, 7, -100])
    loss, gradient = row_losses(logits, target)
    assert np.all(loss[[1, 2, 3, 5]] == 0)
    assert np.all(gradient[[1, 2, 3, 5]] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_nothing_but_ignored_rows_is_nan_and_its_gradient_zero(dtype, isa):
    logits = np.ones((3, 4), DTYPES[dtype])
    loss, gradient = fastloss.cross_entropy(logits, np.full(3, -100), return_grad=True)
    assert np.isnan(loss)
    assert np.all(gradient == 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_with_a_denominator_is_zero(reduction, isa):
    loss, gradient = (
        fastloss.cross_entropy(
            np.ones((3, 4), np.float32), np.full(3, -100), reduction=reduction, denominator=7.0, return_grad=True
        )
        if reduction == "mean"
        else fastloss.cross_entropy(np.ones((3, 4), np.float32), np.full(3, -100), reduction=reduction, return_grad=True)
    )
    assert loss == 0
    assert np.all(gradient == 0)


# pytorch #63004, #104776; Megatron #737: a class id used as ignore_index was still counted.
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_id_as_ignore_index_is_not_counted(weighted, smoothing, isa, rng):
    logits = rng.standard_normal((8, 10)).astype(np.float32)
    target = np.array([0, 1, 2, 0, 3, 0, 4, 5])
    weight = rng.uniform(0.5, 2, 10).astype(np.float32) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing}
    loss, gradient = fastloss.cross_entropy(logits, target, ignore_index=0, return_grad=True, **options)
    counted = target != 0
    expected, expected_gradient = fastloss.cross_entropy(logits[counted], target[counted], return_grad=True, **options)
    assert loss == expected
    np.testing.assert_array_equal(gradient[counted], expected_gradient)
    assert np.all(gradient[~counted] == 0)


# ---- shapes at the edge ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_class_has_loss_zero_and_gradient_zero(dtype, isa):
    logits = np.array([[3.0], [-1e4], [0.0]], DTYPES[dtype])
    loss, gradient = row_losses(logits, np.zeros(3, np.int64))
    assert np.all(loss == 0)
    assert np.all(gradient == 0)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_no_rows_give_a_nan_mean_a_zero_sum_and_no_losses(shape, soft, isa):
    logits = np.zeros(shape, np.float32)
    target = np.zeros(shape, np.float32) if soft else np.zeros((shape[0], *shape[2:]), np.int64)
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    assert np.isnan(loss)
    assert gradient.shape == shape
    assert fastloss.cross_entropy(logits, target, reduction="sum") == 0
    assert fastloss.cross_entropy(logits, target, reduction="none").shape == (shape[0], *shape[2:])


def test_one_row_without_a_batch_is_legal(isa, rng):
    logits = rng.standard_normal(1000).astype(np.float32)
    loss, gradient = fastloss.cross_entropy(logits, np.int64(3), return_grad=True)
    assert np.ndim(loss) == 0
    assert gradient.shape == (1000,)
    assert_cross_entropy_contract(np.asarray(loss), gradient[None], logits[None], np.array([3]))


# ---- softcap and padding ----


# Unsloth #10616, tokamax: padding up to the block leaked through the softcap, or was never masked: log(1 + pad / V) too high.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", AWKWARD_LENGTHS)
def test_padding_never_leaks_through_softcap(classes, dtype, isa):
    # Far below the softcap, where a padded class (z = 0 or -softcap) would hold nearly all of the probability.
    logits = np.full((2, classes), -3000.0, DTYPES[dtype])
    logits[:, 0] = -2000
    target = np.array([0, classes - 1])
    options = Options(softcap=1000.0)
    loss, gradient = row_losses(logits, target, softcap=1000.0)
    assert_cross_entropy_contract(loss, gradient, logits, target, options, "none")


@pytest.mark.parametrize("classes", AWKWARD_LENGTHS)
def test_padding_never_leaks_into_the_normaliser(classes, isa):
    logits = np.full((3, classes), -50.0, np.float32)
    stats = fastloss.logit_stats(logits, want=("logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob"))
    z = reference.wide(logits)
    for name in stats._fields:
        if getattr(stats, name) is not None:
            assert_loss_close(getattr(stats, name), reference.STATISTICS[name](z), np.float32)


@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 1e3])
def test_softcap_bounds_every_logit(softcap, isa, rng):
    logits = (100 * rng.standard_normal((4, 3000))).astype(np.float32)
    stats = fastloss.logit_stats(logits, want=("logsumexp",), softcap=softcap)
    assert np.all(stats.logsumexp <= np.float32(softcap + np.log(3000) * (1 + 1e-6)))


def test_probabilities_below_the_smallest_normal_number_are_zero_or_subnormal(isa):
    logits = np.array([[0.0, -86.0, -88.0, -90.0, -150.0, -1e30]], np.float32)
    _, gradient = row_losses(logits, np.array([0]))
    assert np.all(gradient[0, 1:] >= 0)
    assert gradient[0, 1] > 0
    assert np.all(gradient[0, 4:] == 0)


@pytest.mark.skipif(bfloat16 is None, reason="needs ml_dtypes")
def test_bfloat16_gradients_below_the_smallest_normal_number_are_zero(isa, rng):
    logits = rng.standard_normal((3, 5000)).astype(bfloat16)
    target = np.array([0, 17, 4999])
    _, normal = fastloss.cross_entropy(logits, target, denominator=1.0, return_grad=True)
    for shrink in (2.0**-119, 2.0**-100):
        _, gradient = fastloss.cross_entropy(logits, target, denominator=1 / shrink, return_grad=True)
        exact = normal.astype(np.float64) * shrink
        kept = np.abs(exact) >= 2.0**-126
        assert np.array_equal(gradient.astype(np.float64), np.where(kept, exact, 0))
    assert kept.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_logits_are_finite(dtype, isa):
    largest = {"float16": 6e4, "float64": 1e308}.get(dtype, 3e38)
    logits = np.array([[largest, -largest, 0.0], [largest, largest, largest]], DTYPES[dtype])
    loss, gradient = row_losses(logits, np.array([0, 1]))
    assert loss[0] == 0
    assert_loss_close(loss[1:], np.array([np.log(np.longdouble(3))]).astype(accumulation(DTYPES[dtype])), DTYPES[dtype])
    assert np.all(np.isfinite(gradient.astype(np.float64)))
