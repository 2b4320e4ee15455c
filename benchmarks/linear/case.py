# SPDX-License-Identifier: Apache-2.0
"""Inputs of linear cross-entropy: hidden states, weights and targets, and the float64 answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from fastloss._chunks import chunk_size

from ..cases import DTYPES

IGNORED = -100
TOKENS, CLASSES = 256, 8192  # rows of the two gradients that the reference has, at most


@dataclass(frozen=True)
class Part:
    """Some rows of one gradient of the mean loss: `expected` is that of the loss, `by_probabilities` leaves the targets out."""

    rows: torch.Tensor
    expected: torch.Tensor
    by_probabilities: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """Mean loss and rows of both gradients, from float64 arithmetic on the stored factors."""

    loss: float
    by_hidden: Part
    by_weight: Part


@dataclass
class LinearCase:
    """Logits with standard deviation 2; in every second token the target is about as likely as all the rest."""

    scale: ClassVar[float] = 2.0  # the standard deviation
    every: ClassVar[int] = 2
    odds: ClassVar[float] = 1.0  # of the target, in every so many tokens; 0: none is made likely
    tokens: int
    classes: int
    features: int
    dtype: str
    seed: int = 0
    ignored: float = 0.0  # of the tokens, such a share

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.tokens, self.classes, self.features

    @property
    def product_flops(self) -> float:
        """Operations of one of the three products."""
        return 2.0 * self.tokens * self.classes * self.features

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.classes * DTYPES[self.dtype].itemsize

    @property
    def chunk(self) -> int:
        """Tokens whose logits fastloss makes at a time."""
        one = 2 * self.weight.numel() if self.dtype != "float32" else 0
        return chunk_size(None, self.tokens, self.classes, one)

    @cached_property
    def labels(self) -> torch.Tensor:
        return torch.randint(self.classes, (self.tokens,), generator=torch.Generator().manual_seed(self.seed + 1))

    @cached_property
    def target(self) -> torch.Tensor:
        ignored = torch.rand(self.tokens, generator=torch.Generator().manual_seed(self.seed + 3)) < self.ignored
        return self.labels.masked_fill(ignored, IGNORED)

    @cached_property
    def weight(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scale = self.scale / math.sqrt(self.features)
        return torch.empty(self.classes, self.features, dtype=DTYPES[self.dtype]).normal_(0.0, scale, generator=generator)

    @cached_property
    def hidden(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 2)
        hidden = torch.empty(self.tokens, self.features).normal_(generator=generator)
        if self.odds:
            chosen, towards = hidden[:: self.every], self.weight[self.labels[:: self.every]].float()
            # The log sum exp of normal logits, and the odds.
            likely = math.log(self.classes) + self.scale**2 / 2 + math.log(self.odds)
            chosen += towards * ((likely - (chosen * towards).sum(1)) / towards.square().sum(1)).unsqueeze(1)
        return hidden.to(DTYPES[self.dtype])

    @cached_property
    def reference(self) -> Reference:
        """The float64 answer, with rows spread evenly over the tokens that count and over the classes."""
        counted = (self.target != IGNORED).nonzero().squeeze(1)
        hidden, weight, target = self.hidden[counted].double(), self.weight.double(), self.target[counted]
        tokens, classes = _spread(len(counted), TOKENS), _spread(self.classes, CLASSES)
        losses, of_classes = [], []
        for h, y in zip(hidden.split(64), target.unsqueeze(1).split(64), strict=True):
            z = h @ weight.T
            lse = z.logsumexp(1, keepdim=True)
            losses.append(lse - z.gather(1, y))
            of_classes.append((z[:, classes] - lse).exp())
        by_weight = torch.cat(of_classes).T @ hidden / len(counted)
        by_hidden = torch.cat([(h @ weight.T).softmax(1) @ weight for h in hidden[tokens].split(64)]) / len(counted)
        labels = torch.zeros_like(weight).index_add_(0, target, hidden)[classes] / len(counted)
        return Reference(
            float(torch.cat(losses).mean()),
            Part(counted[tokens], by_hidden - weight[target[tokens]] / len(counted), by_hidden),
            Part(classes, by_weight - labels, by_weight),
        )


def _spread(length: int, count: int) -> torch.Tensor:
    return torch.linspace(0, length - 1, min(length, count)).long()
