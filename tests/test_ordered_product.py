# SPDX-License-Identifier: Apache-2.0
"""The products of linear cross-entropy: right for any layout, and the same bits for any threads, chunks, instruction sets."""

import numpy as np
import pytest

import fastloss
from binding import address, tensor
from fastloss import _cpu
from helpers import DTYPES, accumulation, assert_same_bits, ulp

SHAPES = [(1, 1, 1), (3, 70, 5), (300, 7, 65), (129, 200, 64), (13, 1, 3), (5, 3000, 300), (50, 129, 1000)]
LAYOUTS = {
    "rows": lambda classes, features, draw: draw(classes, features),
    "columns": lambda classes, features, draw: draw(features, classes).T,
    "rows with a step": lambda classes, features, draw: draw(classes, features + 5)[:, :features],
    "every second": lambda classes, features, draw: draw(classes, 2 * features)[:, ::2],
    "backwards": lambda classes, features, draw: draw(classes, features)[::-1, ::-1],
    "one row": lambda classes, features, draw: np.broadcast_to(draw(1, features), (classes, features)),
}


def product(hidden, weight, bias=None, out=None):
    out = np.full((len(hidden), len(weight)), np.nan, weight.dtype) if out is None else out
    _cpu.ordered_product(tensor(hidden, 1), tensor(weight, 1), address(bias), tensor(out, 1))
    return out


def factors(shape, dtype, rng, layout="rows"):
    """Values of the dtype, hidden states and bias in its accumulation type."""
    tokens, classes, features = shape
    wide = accumulation(dtype)

    def draw(*lengths):
        return rng.standard_normal(lengths).astype(dtype)

    return draw(tokens, features).astype(wide), LAYOUTS[layout](classes, features, draw), draw(classes).astype(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_for_any_layout(shape, layout, dtype, rng, set_threads):
    dtype = DTYPES[dtype]
    hidden, weight, bias = factors(shape, dtype, rng, layout)
    h, w, b = (a.astype(np.float64) for a in (hidden, weight, bias))
    unit = 2.0**-53 if dtype == np.float64 else 2.0**-24
    for threads in (1, 2, 7):
        set_threads(threads)
        for added in (None, bias):
            exact, scale = (f(h) @ f(w).T + (0 if added is None else f(b)) for f in (lambda x: x, np.abs))
            found = product(hidden, weight, added)
            allowed = (shape[2] + 1) * unit * scale + ulp(exact, dtype)
            assert (np.abs(found.astype(np.float64) - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_sum_is_one_chain_of_fused_multiply_adds(dtype, rng, isa):
    hidden, weight, bias = factors((2, 3, 40), DTYPES[dtype], rng)
    steps = np.longdouble if hidden.dtype == np.float64 else np.float64  # a product of two numbers is exact there
    expected = np.empty((2, 3), hidden.dtype)
    for i, j in np.ndindex(expected.shape):
        total = bias[j]
        for a, b in zip(hidden[i], weight[j].astype(hidden.dtype), strict=True):
            total = hidden.dtype.type(steps(a) * steps(b) + steps(total))
        expected[i, j] = total
    found = product(hidden, weight, bias)
    if hidden.dtype == np.float32:
        assert_same_bits(found, expected.astype(weight.dtype))
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_on_every_instruction_set(shape, dtype, rng):
    hidden, weight, bias = factors(shape, DTYPES[dtype], rng)
    before = fastloss.isa()
    try:
        _cpu.set_isa("scalar")
        expected = product(hidden, weight, bias)
        for isa in fastloss.available_isas():
            _cpu.set_isa(isa)
            assert_same_bits(product(hidden, weight, bias), expected)
    finally:
        _cpu.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 100, 999, 1001])
@pytest.mark.parametrize("features", [1, 31, 200])
def test_the_same_bits_for_any_threads_and_tokens_at_a_time(features, classes, dtype, rng, set_threads):
    hidden, weight, bias = factors((100, classes, features), DTYPES[dtype], rng)
    expected = product(hidden, weight, bias)
    for threads, step in ((1, 100), (2, 100), (7, 100), (40, 100), (2, 1), (3, 16), (5, 77)):
        set_threads(threads)
        for start in range(0, 100, step):
            assert_same_bits(product(hidden[start : start + step], weight, bias), expected[start : start + step])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [63, 64, 130])
def test_it_writes_between_other_columns_and_nowhere_else(classes, dtype, rng, isa):
    hidden, weight, bias = factors((9, classes, 5), DTYPES[dtype], rng)
    room = np.full((11, classes + 4), 7, DTYPES[dtype])
    product(hidden, weight, bias, room[1:10, 2 : 2 + classes])
    assert_same_bits(np.ascontiguousarray(room[1:10, 2 : 2 + classes]), product(hidden, weight, bias))
    room[1:10, 2 : 2 + classes] = 7
    assert (room == 7).all()


def test_a_large_product_that_goes_past_the_caches_has_the_same_bits(rng, set_threads):
    hidden, weight, bias = factors((600, 16384, 3), np.dtype(np.float32), rng)  # 39 MB
    whole = product(hidden, weight, bias)
    assert_same_bits(whole[100:103], product(np.ascontiguousarray(hidden[100:103]), weight, bias))
    set_threads(1)
    assert_same_bits(whole, product(hidden, weight, bias))


def test_infinities_and_nan_are_those_of_the_formula(isa):
    hidden = np.array([[1.0, 0.0], [np.inf, 1.0], [np.nan, 1.0]], np.float32)
    weight = np.array([[1.0, 2.0], [-1.0, np.inf], [0.0, 0.0]], np.float32)
    expected = np.array([[1, np.nan, 0], [np.inf, np.nan, np.nan], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(product(hidden, weight), expected)


# ---- the product that makes gradients ----


def sum_of_products(left, right, add=None, out=None):
    """left @ right, added to `add`."""
    out = np.full((len(left), right.shape[1]), np.nan, accumulation(right.dtype)) if out is None else out
    if add is not None:
        out[...] = add
    _cpu.add_product(tensor(left, 1), tensor(right, 1), add is not None, tensor(out, 1))
    return out


PRODUCTS = [
    (1, 1, 1),
    (3, 70, 5),
    (300, 7, 65),
    (7, 1500, 130),
    (900, 3, 64),
    (13, 300, 1),
    (5, 0, 3),
    (100, 2900, 3),
    (3, 5, 1100),
]


def factors_of_sum(shape, dtype, rng, layouts=("rows", "rows")):
    rows, depth, columns = shape

    def draw(*lengths):
        return rng.standard_normal(lengths).astype(dtype)

    return LAYOUTS[layouts[0]](rows, depth, draw), LAYOUTS[layouts[1]](depth, columns, draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", ["rows", "columns", "backwards"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_sums_of_products_are_right_for_any_layout(shape, left, right, dtype, rng, set_threads):
    left, right = factors_of_sum(shape, DTYPES[dtype], rng, (left, right))
    exact, scale = (f(left.astype(np.float64)) @ f(right.astype(np.float64)) for f in (lambda x: x, np.abs))
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    for threads in (1, 2, 7):
        set_threads(threads)
        found = sum_of_products(left, right)
        assert_same_bits(found, sum_of_products(np.ascontiguousarray(left), np.ascontiguousarray(right)))
        assert (np.abs(found - exact) <= (shape[1] + 1) * unit * scale).all()
        more = sum_of_products(left, right, add=found)
        assert (np.abs(more - 2 * exact) <= 2 * (shape[1] + 1) * unit * (2 * scale)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_sums_of_products_have_the_same_bits_for_any_threads_parts_and_isa(shape, dtype, rng, set_threads):
    left, right = factors_of_sum(shape, DTYPES[dtype], rng, ("columns", "rows"))
    before = fastloss.isa()
    try:
        _cpu.set_isa("scalar")
        expected = sum_of_products(left, right)
        for isa in fastloss.available_isas():
            _cpu.set_isa(isa)
            for threads, rows, depth in ((1, 1000, 5000), (2, 1000, 5000), (7, 1000, 5000), (40, 17, 5000), (3, 1000, 64)):
                set_threads(threads)
                found = np.full_like(expected, np.nan)
                for row in range(0, shape[0], rows):
                    part = found[row : row + rows]
                    for k in range(0, max(1, shape[1]), depth):
                        factors = left[row : row + rows, k : k + depth], right[k : k + depth]
                        sum_of_products(*factors, add=part.copy() if k else None, out=part)
                assert_same_bits(found, expected)
    finally:
        _cpu.set_isa(before)


@pytest.mark.parametrize("columns", [63, 64, 130])
def test_sums_of_products_are_written_between_other_columns_and_nowhere_else(columns, rng, isa):
    left, right = factors_of_sum((9, 5, columns), np.dtype(np.float32), rng)
    room = np.full((11, columns + 4), 7, np.float32)
    sum_of_products(left, right, out=room[1:10, 2 : 2 + columns])
    assert_same_bits(np.ascontiguousarray(room[1:10, 2 : 2 + columns]), sum_of_products(left, right))
    room[1:10, 2 : 2 + columns] = 7
    assert (room == 7).all()


def sum_in_blocks(left, right, out=None):
    out = np.full((len(left), right.shape[1]), np.nan, accumulation(right.dtype)) if out is None else out
    _cpu.product(tensor(left, 1), tensor(right, 1), tensor(out, 1))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*PRODUCTS, (7, 4300, 70)], ids=str)
def test_sums_in_blocks_are_right_and_have_the_same_bits_for_any_threads_and_isa(shape, dtype, rng, set_threads):
    left, right = factors_of_sum(shape, DTYPES[dtype], rng, ("rows", "columns"))
    exact, scale = (f(left.astype(np.float64)) @ f(right.astype(np.float64)) for f in (lambda x: x, np.abs))
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    before, results = fastloss.isa(), []
    try:
        for isa in fastloss.available_isas():
            _cpu.set_isa(isa)
            for threads in (1, 2, 7, 40):
                set_threads(threads)
                room = np.full((shape[0], shape[2] + 2), np.nan, accumulation(right.dtype))
                results.append(np.ascontiguousarray(sum_in_blocks(left, right, room[:, 1:-1])))
                assert np.isnan(room[:, [0, -1]]).all()
    finally:
        _cpu.set_isa(before)
    for found in results:
        assert_same_bits(found, results[0])
    assert (np.abs(results[0] - exact) <= (shape[1] + 1) * unit * scale).all()


def test_errors_of_long_sums_in_blocks_are_small(rng):
    left, right = factors_of_sum((20, 128_256, 20), np.float32, rng)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    chain, blocks = (np.sqrt(np.mean((f(left, right) - exact) ** 2)) for f in (sum_of_products, sum_in_blocks))
    assert blocks < chain / 4
