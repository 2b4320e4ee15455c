# SPDX-License-Identifier: Apache-2.0
"""Inputs of a benchmark: logits of one shape and dtype, targets, and the float64 answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Reference:
    """Mean loss, and the gradient of the mean at sampled positions, from float64 arithmetic on the stored logits."""

    loss: float
    slices: list[tuple[int, torch.Tensor]]  # (index of the first dimension, gradient of shape (classes, positions))
    position_step: int


@dataclass
class Case:
    """Logits of shape `(N, C)` or `(N, C, d1, ...)`; in every second row the target is about as likely as the rest."""

    shape: tuple[int, ...]
    dtype: str
    seed: int = 0
    label: str = ""
    _working: torch.Tensor | None = field(default=None, repr=False)

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    @property
    def nbytes(self) -> int:
        """Bytes of the logits: one unit of the traffic model."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @cached_property
    def target(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(self.classes, (self.shape[0], *self.shape[2:]), generator=generator)

    @cached_property
    def logits(self) -> torch.Tensor:
        """The pristine logits. No job may write to them."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.empty(self.shape, dtype=DTYPES[self.dtype]).normal_(0.0, 2.0, generator=generator)
        likely = math.log(self.classes) + 2.0  # log sum exp of normal logits with standard deviation 2
        logits[::2].scatter_(1, self.target[::2].unsqueeze(1), likely)
        return logits

    @property
    def working(self) -> torch.Tensor:
        """A second buffer of the same size, for whoever overwrites its logits. Refill it before use."""
        if self._working is None:
            self._working = self.logits.clone()
        return self._working

    @cached_property
    def reference(self) -> Reference:
        """The float64 answer; of the gradient, a sample of about 16 rows (2-D) or of 2 x 512 positions."""
        logits = self.logits.reshape(*self.shape[:2], -1)
        target = self.target.reshape(self.shape[0], 1, -1)
        total = 0.0
        per_chunk = max(1, 2**22 // (self.classes * logits.shape[2]))
        for z, y in zip(logits.split(per_chunk), target.split(per_chunk), strict=True):
            z = z.double()
            total += float((z.logsumexp(1, keepdim=True) - z.gather(1, y)).sum())
        sampled = sorted({round(i * (self.shape[0] - 1) / 15) for i in range(16)})
        if logits.shape[2] > 1:
            sampled = sorted({0, self.shape[0] - 1})
        step = max(1, logits.shape[2] // 512)
        slices = []
        for index in sampled:
            z = logits[index, :, ::step].double()
            gradient = z.softmax(0)
            gradient.scatter_add_(0, target[index, :, ::step], torch.full_like(z[:1], -1.0))
            slices.append((index, gradient / self.rows))
        return Reference(total / self.rows, slices, step)
