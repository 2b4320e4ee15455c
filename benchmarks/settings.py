# SPDX-License-Identifier: Apache-2.0
"""How large and how long a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .peers import Peer


@dataclass(frozen=True)
class Settings:
    """`elements` is N x V of the large cases: the traffic stays the same whatever the vocabulary is."""

    peers: Mapping[str, Peer]
    vocabularies: tuple[int, ...] = (32000, 128256, 256000)
    elements: int = 1024 * 128256
    rounds: int = 9
    quick: bool = False

    def rows(self, classes: int) -> int:
        """The number of rows that goes with a vocabulary."""
        return max(1, round(self.elements / classes))

    def without(self, *names: str) -> dict[str, Peer]:
        """The peers, less some."""
        return {name: peer for name, peer in self.peers.items() if name not in names}
