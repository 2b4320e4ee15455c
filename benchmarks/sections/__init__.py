"""Sections of the benchmark, in the order of the report. A section is a function from settings to what it measured."""

from __future__ import annotations

from collections.abc import Callable

from ..report import Section
from ..settings import Settings
from . import growth, large, linear, memory, segmentation, small, statistics

SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "loss": large.loss,
    "gradient": large.gradient,
    "statistics": statistics.measure,
    "segmentation": segmentation.measure,
    "small": small.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "linear": linear.measure,
}
