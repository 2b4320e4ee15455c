"""The exponent of a power law."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OUT_OF_CACHE = 64e6  # bytes of logits from which time is a matter of memory, not of caches


def exponent(rows: Sequence[Mapping[str, Any]], peer: str, axis: str, from_bytes: float = OUT_OF_CACHE) -> float | None:
    """Slope of log time over log size among the float32 cases of at least so many bytes; None for fewer than two."""
    index = 0 if axis == "N" else 1
    points = [
        (math.log(row["shape"][index]), math.log(row["ms"]))
        for row in rows
        if row["peer"] == peer and row["axis"] == axis and 4 * math.prod(row["shape"]) >= from_bytes
    ]
    if len(points) < 2:
        return None
    return float(statistics.linear_regression(*zip(*points, strict=True)).slope)
