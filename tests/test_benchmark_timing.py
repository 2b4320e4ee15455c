# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares jobs at one speed of the machine, whichever it had in the rounds that they ran in."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks.timing import at_one_speed

SPEEDS = [1.0, 1.0, 1.35, 1.35, 1.35, 1.0, 1.35]


def test_ratios_are_those_within_the_rounds():
    seconds = {"short": [2 * speed for speed in SPEEDS], "long": [6 * speed for speed in SPEEDS]}
    seconds["stops early"] = [10 * speed for speed in SPEEDS[:2]]
    found = at_one_speed(seconds)
    assert found["long"].median == pytest.approx(3 * found["short"].median)
    assert found["stops early"].median == pytest.approx(5 * found["short"].median)
    assert found["short"].median == pytest.approx(2 * 1.35)  # the speed of the median round
    assert found["short"].high == pytest.approx(found["short"].low)


def test_one_disturbed_run_moves_no_median():
    seconds = {name: [factor * speed for speed in SPEEDS] for name, factor in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    seconds["a"][4] *= 10
    found = at_one_speed(seconds)
    assert found["b"].median == pytest.approx(2 * found["a"].median)
    assert found["c"].median == pytest.approx(3 * found["a"].median)


def test_a_job_alone_keeps_its_spread():
    found = at_one_speed({"alone": [1.0, 2.0, 4.0]})["alone"]
    assert (found.low, found.median, found.high) == (1.5, 2.0, 3.0)
    assert at_one_speed({}) == {}


def test_a_job_that_varies_much_moves_no_other():
    seconds = {name: [factor * speed for speed in SPEEDS] for name, factor in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    seconds["wild"] = [5.0, 20.0, 5.0, 20.0, 20.0, 5.0, 5.0]
    found = at_one_speed(seconds)
    for name, factor in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        assert found[name].high == pytest.approx(found[name].low)
        assert found[name].median == pytest.approx(1.35 * factor)
