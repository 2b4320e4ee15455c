# SPDX-License-Identifier: Apache-2.0
"""What is timed: one job is one operation of one peer on one case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Unsupported(Exception):
    """Raised by a job's constructor when its peer cannot do the case."""


class Job(ABC):
    """`prepare` and `release` stand outside the timer, `run` inside.

    So the memory that a result lives in is allocated inside the timer, as autograd does, and freed outside; whatever a
    peer allocates and frees on its way counts.
    """

    floor_reads: int = 0  # passes over the logits that only read
    floor_updates: int = 0  # passes that read and write

    def prepare(self) -> None:
        """Restores inputs that the last run overwrote."""
        return

    @abstractmethod
    def run(self) -> None:
        """The timed work; keeps its result."""

    def answer(self) -> tuple[float, torch.Tensor | None]:
        """Loss and gradient of the last run."""
        raise NotImplementedError

    def release(self) -> None:
        """Drops the result."""
        return


class TorchLoss(Job):
    """The loss alone, without autograd."""

    floor_reads = 1

    def __init__(self, function: LossFunction, case: Case) -> None:
        self.function, self.logits, self.target = function, case.logits, case.target

    def run(self) -> None:
        with torch.no_grad():
            self.loss = self.function(self.logits, self.target)

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss), None


class TorchGradient(Job):
    """Loss and gradient end to end: `loss = f(logits, target); loss.backward()`, with a leaf whose `.grad` is None.

    The floor is one pass that reads and writes: forward may make the gradient already.
    """

    floor_updates = 1

    def __init__(self, function: LossFunction, case: Case) -> None:
        self.function, self.target = function, case.target
        self.leaf = case.logits.detach().requires_grad_()

    def run(self) -> None:
        self.loss = self.function(self.leaf, self.target)
        self.loss.backward()

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss.detach()), self.leaf.grad

    def release(self) -> None:
        self.loss = self.leaf.grad = None


class Produce(torch.autograd.Function):
    """Stands for the matmul that makes the logits: gives out a buffer as a non-leaf, takes the gradient at no cost."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, job: TorchGradientInPlace) -> torch.Tensor:
        ctx.job = job
        return job.buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.job.gradient = grads[0]
        return torch.zeros(()), None


class TorchGradientInPlace(Job):
    """Loss and gradient over the logits, in one trip.

    A leaf may not be overwritten, so the logits are the output of `Produce`, as in training they are the output of a
    matmul. The buffer is refilled before each run, outside the timer.
    """

    floor_updates = 1

    def __init__(self, function: LossFunction, case: Case) -> None:
        self.function, self.case = function, case
        self.anchor = torch.zeros((), requires_grad=True)
        self.buffer = case.working
        self.gradient: torch.Tensor | None = None

    def prepare(self) -> None:
        self.buffer.copy_(self.case.logits)

    def run(self) -> None:
        self.loss = self.function(Produce.apply(self.anchor, self), self.case.target)
        self.loss.backward()

    def answer(self) -> tuple[float, torch.Tensor | None]:
        if self.gradient is None or self.gradient.data_ptr() != self.buffer.data_ptr():
            raise AssertionError("the gradient does not lie in the memory of the logits")
        return float(self.loss.detach()), self.gradient

    def release(self) -> None:
        self.loss = self.gradient = self.anchor.grad = None


class TorchGradientInBackward(TorchGradientInPlace):
    """The same in two trips."""

    floor_reads = 1
