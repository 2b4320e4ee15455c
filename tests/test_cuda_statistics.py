# SPDX-License-Identifier: Apache-2.0
"""Statistics of rows and their gradient by the CUDA kernels, run on the CPU by tests/cuda_emulation, against the oracle."""

import numpy as np
import pytest

import reference
from binding import aligned_weight
from cuda_binding import STATISTICS, load_emulation, parts_of, poisoned, statistics, statistics_gradient
from helpers import DTYPES, accumulation, assert_gradient_close, assert_loss_close, confident_slack, transform_extra
from reference import Options

cuda = load_emulation()
INF = np.inf


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_of_a_row_whose_scan_is_shared_among_blocks(dtype, rng, order):
    """A block that ranks has all of the row, and room for more of it than one that scanned a part: of 32 KiB, here."""
    classes = 4 * (32 << 10) // np.dtype(DTYPES[dtype]).itemsize
    logits = rng.standard_normal((2, classes)).astype(DTYPES[dtype])
    ids = rng.integers(classes, size=(2, 1))
    assert parts_of(cuda, logits) == 4
    out, _ = statistics(cuda, logits, ids, ("rank",))
    np.testing.assert_array_equal(out["rank"], reference.rank(reference.wide(logits), ids))


def test_argmax_of_a_row_shared_among_blocks_is_the_first(rng):
    logits = np.zeros((1, 200_000), np.float32)
    logits[0, [7, 100_000, 199_999]] = 3
    assert parts_of(cuda, logits) > 1
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
