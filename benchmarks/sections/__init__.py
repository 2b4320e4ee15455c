# SPDX-License-Identifier: Apache-2.0
"""Sections of the benchmark, in the order of the report. A section is a function from settings to what it measured."""

from __future__ import annotations

from collections.abc import Callable

from ..report import Section
from ..settings import Settings
from . import (
    growth,
    large,
    linear,
    linear_growth,
    linear_ignored,
    linear_memory,
    linear_sparse,
    linear_threshold,
    memory,
    segmentation,
    small,
    statistics,
)

SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "loss": large.loss,
    "gradient": large.gradient,
    "statistics": statistics.measure,
    "segmentation": segmentation.measure,
    "small": small.measure,
    "growth": growth.measure,
    "linear": linear.measure,
    "linear-ignored": linear_ignored.measure,
    "linear-growth": linear_growth.measure,
    "linear-threshold": linear_threshold.measure,
    "linear-sparse": linear_sparse.measure,
    # Last: a machine that has lost and regained many GB is not at rest for a while.
    "memory": memory.measure,
    "linear-memory": linear_memory.measure,
}
