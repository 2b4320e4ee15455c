# SPDX-License-Identifier: Apache-2.0
"""`logits.clone()`: what PyTorch needs merely to write a tensor of the size of the gradient. Not a loss, but a mark."""

from __future__ import annotations

import torch

from ..cases import Case
from ..jobs import Job
from . import Peer


class Clone(Job):
    """Reads the logits and writes as many bytes into fresh memory."""

    floor_updates = 1

    def __init__(self, case: Case) -> None:
        self.logits = case.logits
        self.copy: torch.Tensor | None = None

    def run(self) -> None:
        self.copy = self.logits.clone()

    def release(self) -> None:
        self.copy = None


def peers() -> list[Peer]:
    return [Peer("logits.clone()", {"gradient": Clone}, order=60)]
