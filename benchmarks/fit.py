"""The exponent of a power law."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OUT_OF_CACHE = 64e6  # bytes of logits from which time is a matter of memory, not of caches


def exponent(rows: Sequence[Mapping[str, Any]], peer: str, axis: str, from_bytes: float = OUT_OF_CACHE) -> float | None:
    """Slope of log time over log size among the float32 cases of so many bytes of logits; None for fewer than two.

    Shapes are (N, V), or (N, V, H) for linear losses.
    """
    index = "NVH".index(axis)
    points = [
        (math.log(row["shape"][index]), math.log(row["ms"]))
        for row in rows
        if row["peer"] == peer and row["axis"] == axis and 4 * math.prod(row["shape"][:2]) >= from_bytes
    ]
    if len(points) < 2:
        return None
    return float(statistics.linear_regression(*zip(*points, strict=True)).slope)
