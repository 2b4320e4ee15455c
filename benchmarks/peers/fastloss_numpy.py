# SPDX-License-Identifier: Apache-2.0
"""fastloss through its NumPy API, where `return_grad=True` makes the gradient in the same trip over memory."""

from __future__ import annotations

from typing import Any

import torch

import fastloss

from ..cases import Case
from ..jobs import Job, Unsupported
from . import Bound, Peer

# float32: (1 + |z_j - L|) * 2^-22 with |z_j - L| up to 40. bfloat16: that value, rounded once to 8 bits.
BOUNDS = {"float32": Bound(1e-6, 1e-5), "bfloat16": Bound(1e-6, 2.0**-8)}


def as_numpy(tensor: torch.Tensor) -> Any:
    """The same memory as a NumPy array; bfloat16 needs ml_dtypes."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError as error:
        raise Unsupported("bfloat16 arrays need ml_dtypes") from error
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


class NumpyLoss(Job):
    """`cross_entropy(logits, target)`."""

    floor_reads = 1

    def __init__(self, case: Case) -> None:
        self.logits, self.target = as_numpy(case.logits), case.target.numpy()
        self.dtype = case.logits.dtype

    def run(self) -> None:
        self.loss = fastloss.cross_entropy(self.logits, self.target)

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss), None


class NumpyGradient(NumpyLoss):
    """`cross_entropy(logits, target, return_grad=True)`: one trip reads and writes, into fresh memory."""

    floor_reads = 0
    floor_updates = 1

    def run(self) -> None:
        self.loss, self.gradient = fastloss.cross_entropy(self.logits, self.target, return_grad=True)

    def answer(self) -> tuple[float, torch.Tensor | None]:
        gradient = self.gradient
        if self.dtype == torch.bfloat16:
            return float(self.loss), torch.from_numpy(gradient.view("int16")).view(torch.bfloat16)
        return float(self.loss), torch.from_numpy(gradient)

    def release(self) -> None:
        self.gradient = None


def peers() -> list[Peer]:
    return [Peer("fastloss numpy", {"loss": NumpyLoss, "gradient": NumpyGradient}, BOUNDS, order=12)]
