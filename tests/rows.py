# SPDX-License-Identifier: Apache-2.0
"""The rows on which accuracy is promised: not only normal numbers, for a confident row hides what random ones forgive."""

import functools

import numpy as np

from helpers import DTYPES

ROWS = 3


def flat(rng, classes):
    return np.repeat([[0.0], [0.1], [-7.3]], classes, axis=1)


def random(rng, classes):
    return rng.standard_normal((ROWS, classes)) * [[0.1], [1.0], [4.0]]


def wide(rng, classes):
    return rng.uniform(-100, 100, (ROWS, classes))


def peaked(rng, classes):
    """One class far above the others, at the first, a middle and the last place."""
    x = rng.standard_normal((ROWS, classes))
    x[[0, 1, 2], [0, classes // 2, classes - 1]] += 20
    return x


def confident(rng, classes):
    """The target has p = 0.999, 1 - 1e-5 and 1 - 1e-8."""
    x = 0.5 * rng.standard_normal((ROWS, classes))
    places = [0, classes // 2, classes - 1]
    x[[0, 1, 2], places] = -np.inf
    others = np.log(np.exp(x).sum(axis=-1))
    x[[0, 1, 2], places] = others + np.log(np.array([1e3, 1e5, 1e8]) - 1)
    return x


def offset(rng, classes):
    return rng.standard_normal((ROWS, classes)) * 2 + [[1e4], [-1e4], [1e4]]


def masked(rng, classes):
    """-inf in the leading half, in the trailing half, and in every class but a few."""
    x = rng.standard_normal((ROWS, classes))
    x[0, : classes // 2] = -np.inf
    x[1, (classes + 1) // 2 :] = -np.inf
    keep = rng.integers(classes, size=3)
    x[2, np.setdiff1d(np.arange(classes), keep)] = -np.inf
    return x


KINDS = {f.__name__: f for f in (flat, random, wide, peaked, confident, offset, masked)}


@functools.cache
def logits_and_target(kind, classes, dtype):
    """Rows of a kind, rounded to the dtype, with a target that may be hit: the top class for confident rows."""
    rng = np.random.default_rng(classes + len(kind))
    x = KINDS[kind](rng, classes).astype(DTYPES[dtype])
    if kind in ("confident", "masked"):
        target = np.argmax(x, axis=-1)
    elif kind == "peaked":
        target = np.array([0, 0, classes - 1])
    else:
        target = rng.integers(classes, size=ROWS)
    x.flags.writeable = False
    return x, target
