# SPDX-License-Identifier: Apache-2.0
"""Peers, one plug-in a file. A plug-in defines `peers() -> list[Peer]`, or raises ImportError where it cannot work.

To add a peer, add a file here: nothing else has to know its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..jobs import Job


@dataclass(frozen=True)
class Bound:
    """The errors against float64 that a peer may have before its timings are refused, both relative."""

    loss: float
    gradient: float


@dataclass(frozen=True)
class Peer:
    """`jobs` maps an operation (`loss`, `gradient`, `gradient in place`, `linear`) to what makes the job for a case."""

    name: str
    jobs: Mapping[str, Callable[[Any], Job]]  # from a Case, for `linear` from a LinearCase
    bounds: Mapping[str, Bound] = field(default_factory=dict)  # by dtype; none: the answer is not a loss
    slow: bool = False  # run in the first rounds only
    once: bool = False  # so slow that the run whose answer is checked is the one that is timed
    sampled: bool = False  # its gradient is a random one, with the right expectation
    order: int = 50  # place in tables
    apart: bool = False  # runs after the others: its threads stay busy for a while after its answer, and would slow them down


def load() -> tuple[dict[str, Peer], dict[str, str]]:
    """Returns the peers that are installed, by name, and the reason for each plug-in that is not."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            found += importlib.import_module(f"{__name__}.{module.name}").peers()
        except (ImportError, OSError, RuntimeError) as error:  # noqa: PERF203
            missing[module.name] = str(error)
    return {peer.name: peer for peer in sorted(found, key=lambda peer: peer.order)}, missing
