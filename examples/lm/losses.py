# SPDX-License-Identifier: Apache-2.0
"""The table of losses. To add one, add a line.

A loss maps (hidden, head weight, targets) to a scalar and tells the stopwatch where it begins and ends, so that a loss
that never stores the logits fits in as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .config import Config
from .stopwatch import Stopwatch

LogitsLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Stopwatch], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """`make` returns the loss function; it is called in the process that trains with it, so imports go there."""

    name: str
    title: str
    colour: str  # Okabe and Ito's palette
    make: Callable[[Config], HeadLoss]
    sampled: bool = False  # its gradients are random ones, with the right expectation


def on_logits(make: Callable[[], LogitsLoss]) -> Callable[[Config], HeadLoss]:
    """A head loss from one that takes logits: a matmul, then the loss, which alone is timed."""

    def make_head_loss(config: Config) -> HeadLoss:
        function = make()

        def head_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, stopwatch: Stopwatch) -> torch.Tensor:
            logits = F.linear(hidden, weight)
            return stopwatch.loss(logits, lambda: function(logits, target))

        return head_loss

    return make_head_loss


def _eager() -> LogitsLoss:
    return F.cross_entropy


def _compile() -> LogitsLoss:
    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target)

    return torch.compile(cross_entropy, dynamic=False)


def _fastloss() -> LogitsLoss:
    import fastloss.torch

    # The logits come fresh from a matmul, which does not need them again: the gradient may take their place.
    return lambda logits, target: fastloss.torch.cross_entropy(logits, target, inplace=True)


def _linear(backward: str) -> Callable[[Config], HeadLoss]:
    def make(config: Config) -> HeadLoss:
        import fastloss.torch

        def head_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, stopwatch: Stopwatch) -> torch.Tensor:
            return fastloss.torch.linear_cross_entropy(hidden, weight, target, backward=backward, threshold=config.threshold)

        return head_loss

    return make


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("eager", "F.cross_entropy", "#D55E00", on_logits(_eager)),
        Loss("compile", "F.cross_entropy under torch.compile", "#E69F00", on_logits(_compile)),
        Loss("fastloss", "fastloss.torch.cross_entropy(inplace=True)", "#0072B2", on_logits(_fastloss)),
        Loss("linear", "fastloss.torch.linear_cross_entropy", "#009E73", _linear("exact")),
        Loss("linear-sampled", 'the same, backward="sampled"', "#CC79A7", _linear("sampled"), sampled=True),
    )
}
