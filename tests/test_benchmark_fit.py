# SPDX-License-Identifier: Apache-2.0
"""What the benchmark calls linear: a line with an offset is, a power, a logarithm and a cliff are not."""

import math
import random

import pytest
from benchmarks.fit import TOLERANCE, fit_line, last_step, overall, points

SIZES = [2**k for k in range(9, 14)]


def times(function, noise=0.0):
    rng = random.Random(0)
    return [(size, function(size) * (1 + rng.uniform(-noise, noise))) for size in SIZES]


LINEAR = {
    "proportional": lambda x: 3e-3 * x,
    "offset": lambda x: 17 + 0.07 * x,
    "offset that is most of it": lambda x: 1000 + 0.01 * x,
    "small cliff": lambda x: (1.1 if x > 2000 else 1.0) * x,
}
NOT_LINEAR = {
    "x^1.3": lambda x: x**1.3,
    "x^1.3 with an offset": lambda x: 1000 + x**1.3,
    "x^2": lambda x: x**2,
    "x^0.5": lambda x: x**0.5,
    "x log x": lambda x: x * math.log(x / 64),
    "cliff of 1.5": lambda x: (1.5 if x > 2000 else 1.0) * x,
    "x log x with a cliff": lambda x: x * math.log(x) * (1.25 if x > 2000 else 1.0),
}


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("name", LINEAR)
def test_lines_are_within_the_tolerance(name, noise):
    found = times(LINEAR[name], noise)
    assert fit_line(found).distance <= TOLERANCE
    assert last_step(found) <= 1 + TOLERANCE


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_not(name, noise):
    assert fit_line(times(NOT_LINEAR[name], noise)).distance > TOLERANCE


@pytest.mark.parametrize("factor", [1.2, 1.5])
def test_a_cliff_before_the_largest_size_shows_in_the_last_step(factor):
    found = times(lambda x: 0.07 * x * (factor if x == SIZES[-1] else 1.0))
    assert last_step(found) == pytest.approx(factor)


@pytest.mark.parametrize("name", LINEAR)
def test_growth_over_all_sizes_is_that_of_the_size_or_less(name):
    assert overall(times(LINEAR[name])) <= 1 + TOLERANCE


def test_growth_over_all_sizes_shows_a_power():
    assert overall(times(NOT_LINEAR["x^1.3"])) == pytest.approx(16**0.3)
    assert overall(times(NOT_LINEAR["cliff of 1.5"])) == pytest.approx(1.5)


def test_the_line_is_found():
    line = fit_line(times(lambda x: 17 + 0.07 * x))
    assert line == pytest.approx((17, 0.07, 0), abs=1e-9)
    assert fit_line(times(lambda x: 0.07 * x - 17)).offset == 0  # no call costs less than nothing
    assert fit_line(times(lambda x: x)[:2]) is None
    assert last_step([]) is None


def test_points_are_those_of_a_peer_along_an_axis():
    rows = [
        {"peer": peer, "axis": axis, "shape": [10, 1000 * k, 7], "ms": k}
        for peer in ("ours", "theirs")
        for axis in "VH"
        for k in (1, 2, 3)
    ]
    assert points(rows, "ours", "V") == [(1000, 1), (2000, 2), (3000, 3)]
    assert points(rows, "ours", "V", from_bytes=80000) == [(2000, 2), (3000, 3)]
