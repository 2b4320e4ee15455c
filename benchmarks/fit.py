# SPDX-License-Identifier: Apache-2.0
"""Whether time is linear in a size: a line with a cost per call, and how far the times are from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OUT_OF_CACHE = 128e6  # bytes of logits from which time is a matter of memory, not of caches
TOLERANCE = 0.1  # what the noise of a shared machine may add
Point = tuple[float, float]  # size, time


class Line(NamedTuple):
    """time = offset + slope * size, offset >= 0; `distance` is that of the farthest time, relative to the time."""

    offset: float
    slope: float
    distance: float


def fit_line(points: Sequence[Point]) -> Line | None:
    """The line with the smallest squares of relative distances; None for fewer than three points.

    An exponent of a power law would not do: offset + slope * size has one below 1, and is linear.
    """
    if len(points) < 3:
        return None
    # Divided by its time, each point asks for offset * u + slope * v = 1.
    uv = [(1 / time, size / time) for size, time in points]
    uu, vv, mixed = (sum(p[i] * p[j] for p in uv) for i, j in ((0, 0), (1, 1), (0, 1)))
    u, v = (sum(p[i] for p in uv) for i in (0, 1))
    offset = max(0.0, (u * vv - v * mixed) / (uu * vv - mixed * mixed))
    slope = (v - offset * mixed) / vv
    return Line(offset, slope, max(abs(offset * a + slope * b - 1) for a, b in uv))


def last_step(points: Sequence[Point]) -> float | None:
    """By how much more the time grows than the size, from the largest size but one to the largest: 1 is linear."""
    return overall(sorted(points)[-2:])


def overall(points: Sequence[Point]) -> float | None:
    """The same from the smallest size to the largest: less than 1 where a call has a cost of its own."""
    if len(points) < 2:
        return None
    size, time = min(points)
    largest, longest = max(points)
    return (longest / time) / (largest / size)


def points(rows: Sequence[Mapping[str, Any]], peer: str, axis: str, from_bytes: float = 0) -> list[Point]:
    """Sizes and milliseconds of a peer along an axis, from so many bytes of float32 logits on.

    Shapes are (N, V), or (N, V, H) for linear losses.
    """
    index = "NVH".index(axis)
    return [
        (row["shape"][index], row["ms"])
        for row in rows
        if row["peer"] == peer and row["axis"] == axis and 4 * math.prod(row["shape"][:2]) >= from_bytes
    ]
