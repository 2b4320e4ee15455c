# SPDX-License-Identifier: Apache-2.0
"""The kernels of linear cross-entropy, run on the CPU by tests/cuda_emulation: chunks, what sampling keeps, sums over it."""

import numpy as np
import pytest

import reference
from binding import CODES
from cuda_binding import DEVICE, ChunkCall, Places, load_emulation, multiply
from fastloss._sampled import slots_of_token
from helpers import DTYPES, accumulation, assert_cross_entropy_contract, assert_same_bits
from reference import Options
from test_sampled import row_factor

cuda = load_emulation()
ROWS, CLASSES = 40, 300
OPTIONS = {
    "plain": Options(),
    "smoothing": Options(label_smoothing=0.2),
    "everything": Options(label_smoothing=0.1, z_loss=0.01, temperature=0.8, softcap=5.0),
}


def problem(dtype, rng, soft=False, rows=ROWS, classes=CLASSES):
    logits = (3 * rng.standard_normal((rows, classes))).astype(DTYPES[dtype])
    target = rng.dirichlet(np.ones(classes), rows).astype(np.float32) if soft else rng.integers(classes, size=rows)
    return logits, target


# ---- chunks ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("shape", [(9, 700), (2, 150_000)], ids=["one trip", "rows shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_keeps_the_contract(dtype, shape, soft, reduction, rng):
    logits, target = problem(dtype, rng, soft, *shape)
    if not soft:
        target[0] = -100
    gradient = np.full_like(logits, np.nan)
    call = ChunkCall(cuda, logits, target, Options(label_smoothing=0.1), reduction=reduction)
    loss = call.forward(gradient)
    assert_cross_entropy_contract(loss, gradient, logits, target, Options(label_smoothing=0.1), reduction)


def test_denominator_of_all_tokens_divides_the_gradient_of_a_chunk(rng):
    logits, target = problem("float32", rng)
    gradient = np.full_like(logits, np.nan)
    loss = ChunkCall(cuda, logits, target, Options(), denominator=7.0).forward(gradient)
    assert_cross_entropy_contract(loss, gradient, logits, target, Options(), "mean", 7.0)


# ---- what sampling keeps ----


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_entry_is_left_out_or_exact_or_of_the_size_of_the_threshold(dtype, name, soft, rng, order):
    options, threshold = OPTIONS[name], 1 / 32
    logits, target = problem(dtype, rng, soft)
    call = ChunkCall(cuda, logits, target, options, reduction="none")
    call.forward()
    places = call.sample(threshold, 7, slots_of_token(threshold, CLASSES, False))
    found, kept = places.dense(CLASSES), np.zeros((ROWS, CLASSES), bool)
    rows, at = np.nonzero(places.kept())
    kept[rows, places.columns[rows, at]] = True
    assert kept.sum() == places.count.sum()  # each column once
    wide = reference.wide(logits)
    exact = np.asarray(reference.cross_entropy_gradient(wide, target, options, "none"), np.float64)
    least = threshold * np.asarray(row_factor(wide, target, options), np.float64)[:, None] * np.ones_like(exact)
    own = np.zeros_like(exact, bool)
    if not soft:
        own[np.arange(ROWS), target] = True
    large = (np.abs(exact) >= least * (1 + 1e-5)) | own
    small = (np.abs(exact) <= least * (1 - 1e-5)) & ~own
    np.testing.assert_allclose(found[large], exact[large], rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(found[small & kept], np.copysign(least, exact)[small & kept], rtol=2e-5)
    assert 0 < (small & kept).sum() < small.sum()


@pytest.mark.parametrize("classes", [1, 7, 33, 2048, 2049, 8192, 9001, 70_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_entries_are_found_whatever_the_length_and_the_start(dtype, classes, rng, order):
    base = rng.standard_normal((3, classes + 5)).astype(DTYPES[dtype])
    for start in (0, 1, 4):
        logits, target = base[:, start : start + classes], rng.integers(classes, size=3)
        call = ChunkCall(cuda, logits, target, Options(), reduction="none")
        call.forward()
        places = call.sample(1e-30, 1, classes)
        assert np.all(places.count == classes)
        assert np.all(np.sort(places.columns, 1) == np.arange(classes))
        exact = reference.cross_entropy_gradient(reference.wide(logits), target, Options(), "none")
        np.testing.assert_allclose(places.dense(classes), exact, rtol=2e-5, atol=1e-9)


def test_random_numbers_depend_on_seed_token_and_class_alone(rng):
    logits, target = problem("float32", rng)
    slots = slots_of_token(1 / 8, CLASSES, True)

    def dense(rows, seed, numbers=None):
        call = ChunkCall(cuda, np.ascontiguousarray(logits[rows]), target[rows].copy(), Options(), reduction="none")
        call.forward()
        return call.sample(1 / 8, seed, slots, numbers).dense(CLASSES)

    whole = dense(slice(None), 1)
    mixed = rng.permutation(ROWS)
    assert_same_bits(dense(mixed, 1, mixed), whole)
    assert not np.array_equal(dense(slice(None), 2), whole)


def test_ignored_tokens_keep_nothing_and_lost_ones_their_nan(rng):
    logits, target = problem("float32", rng, rows=4)
    target[:] = (-100, 5, CLASSES, 7)
    logits[3, 9] = np.nan
    call = ChunkCall(cuda, logits, target, Options(), reduction="none")
    call.forward()
    places = call.sample(1 / 8, 1, 100)
    assert places.count[0] == 0
    assert np.isfinite(places.dense(CLASSES)[1]).all()
    for row, column in ((2, 0), (3, 7)):
        assert places.count[row] == 1
        assert places.columns[row, 0] == column
        assert np.isnan(places.values[row, 0])


def test_a_token_that_needs_more_places_than_there_are_becomes_nan_and_no_other(rng, order):
    logits, target = problem("float32", rng, rows=3)
    logits[1] = 0  # all of its 300 classes are likely to be kept
    target[:] = 5
    call = ChunkCall(cuda, logits, target, Options(), reduction="none")
    call.forward()
    places = call.sample(1 / CLASSES, 1, 250)
    assert places.count[1] == 250
    assert np.isnan(places.values[1]).any()
    assert np.isfinite(places.dense(CLASSES)[[0, 2]]).all()


@pytest.mark.parametrize("options", [Options(), Options(label_smoothing=0.3), Options(label_smoothing=0.3, z_loss=0.015)])
def test_places_suffice_on_average_whatever_the_loss(options, rng):
    """The last one: a z-loss of negative logits that takes nearly all of the factor of the probabilities away."""
    threshold, rows, classes = 1 / 16, 20, 4000
    logits = (rng.standard_normal((rows, classes)) - 40).astype(np.float32)
    call = ChunkCall(cuda, logits, rng.integers(classes, size=rows), options, reduction="none")
    call.forward()
    places = call.sample(threshold, 3, slots_of_token(threshold, classes, options.label_smoothing == 0))
    assert np.isfinite(places.dense(classes)).all()
    limit = (1 if options.label_smoothing == 0 else 2) / threshold + 1
    assert places.count.mean() <= limit + 5 * np.sqrt(limit / rows)


def test_mean_of_many_samples_is_the_gradient(rng):
    row, tokens, threshold = 2 * rng.standard_normal((1, 64)), 4000, 1 / 8
    logits, target = np.repeat(row, tokens, 0).astype(np.float32), np.full(tokens, 5)
    call = ChunkCall(cuda, logits, target, Options(), reduction="none")
    call.forward()
    found = call.sample(threshold, 11, 64).dense(64)
    exact = np.asarray(reference.cross_entropy_gradient(logits[:1], target[:1], Options(), "none"), np.float64)[0]
    variance = np.maximum(threshold * np.abs(exact) - exact**2, 0)
    variance[5] = 0
    assert np.all(np.abs(found.mean(0) - exact) <= 5 * np.sqrt(variance / tokens) + 1e-6)


# ---- sums over it ----


def random_places(dtype, rng, tokens, classes, slots, hot=False):
    places = Places(tokens, slots, classes, DTYPES[dtype])
    for token in range(tokens):
        count = rng.integers(0, slots + 1)
        columns = rng.choice(classes, count, replace=False)
        if hot and count and 3 not in columns:
            columns[0] = 3
        places.count[token] = count
        places.columns[token, :count] = columns
        places.values[token, :count] = rng.standard_normal(count)
    return places


@pytest.mark.parametrize("by_class", [False, True], ids=["tokens", "classes"])
@pytest.mark.parametrize("width", [1, 7, 8, 33, 512, 520, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_with_a_dense_matrix(dtype, width, by_class, rng, order):
    tokens, classes = 30, 50
    places = random_places(dtype, rng, tokens, classes, 20)
    factors = rng.standard_normal(tokens)
    matrix = rng.standard_normal((tokens if by_class else classes, width)).astype(DTYPES[dtype])
    sparse = places.dense(classes) * factors[:, None]
    exact = (sparse.T if by_class else sparse) @ reference.wide(matrix)
    out = multiply(cuda, places, factors, matrix, len(exact), places.by_class(classes) if by_class else None)
    epsilon = {"float32": 2e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(reference.wide(out), exact, rtol=epsilon, atol=epsilon * 4)
    assert np.all(reference.wide(out)[exact == 0] == 0)  # a class without entries


@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_entries_of_one_class_are_shared_by_the_warps_of_a_block(dtype, width, rng, order):
    tokens, classes = 900, 9
    places = random_places(dtype, rng, tokens, classes, 4, hot=True)
    assert (places.columns == 3).sum() > 512
    factors = np.ones(tokens)
    matrix = rng.standard_normal((tokens, width)).astype(DTYPES[dtype])
    by_class = places.by_class(classes)
    exact = places.dense(classes).T @ reference.wide(matrix)
    out = multiply(cuda, places, factors, matrix, classes, by_class)
    epsilon = {"float32": 1e-5, "float64": 1e-13, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(reference.wide(out), exact, rtol=epsilon, atol=epsilon * np.abs(exact).max())
    sums = multiply(cuda, places, factors, matrix, classes, by_class, sums=True)
    np.testing.assert_allclose(reference.wide(sums), places.dense(classes).sum(0), rtol=epsilon, atol=epsilon * 10)
    assert_same_bits(multiply(cuda, places, factors, matrix, classes, by_class), out)


# ---- scaling ----


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 5, 1000, 40_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_scaled_in_place_and_left_alone_by_one(dtype, count, start, rng):
    base = rng.standard_normal(count + 8).astype(DTYPES[dtype])
    for factor in (1.0, -2.5):
        numbers, upstream = base.copy(), np.asarray(factor, accumulation(DTYPES[dtype]))
        place = numbers[start : start + count]
        of_loss = (upstream.ctypes.data, CODES[upstream.dtype], 0)
        cuda.scale(place.ctypes.data, count, CODES[place.dtype], of_loss, *DEVICE)
        expected = base.copy()
        scaled = reference.wide(base[start : start + count]).astype(upstream.dtype) * upstream
        expected[start : start + count] = scaled.astype(base.dtype)
        assert_same_bits(numbers, expected)
