# SPDX-License-Identifier: Apache-2.0
"""Gradients that forward makes in the trip of the loss, for the upstream gradient that it expects.

Of backward a reduced loss needs one number, the upstream gradient: 1 for `loss.backward()`, and mostly the same from step to
step where the loss is scaled. Forward expects that of the last backward. Where it is wrong, backward makes the gradient again
from the logits, in the same memory and to the same bits, and forward makes none until two upstream gradients in a row are
equal. After a gradient that no backward came for it makes none for some steps: a loss that is only logged shall not cost much.
One large gradient waits at a time: losses that wait for a common backward need no more memory than one of them.

A GPU alone knows what its backward brought, and is not waited for. So what it expects lives in its memory, where kernels read
and write it: backward always starts the kernel of the gradient, which returns at once where forward guessed right. Whether it
did, the GPU tells memory of the host, which forward reads as it is then: late, but bits do not depend on what it says.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss._options import RECYCLED_FROM
from fastloss.torch.ops import CPU, fresh

AFTER_NOTHING = 32  # backwards to wait for
# Checkpointing and offloading take saved tensors away; a gradient in their place would defeat them.
saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None
)


class Ahead:
    """A gradient, and the upstream gradient that it was made for."""

    __slots__ = ("__weakref__", "_expectation", "_grad", "upstream")

    def __init__(self, grad: Tensor, upstream: float | Tensor, expectation: Expectation) -> None:
        """Memory for the gradient; a number of a GPU stays there."""
        self._grad: Tensor | None = grad
        self._expectation = expectation
        self.upstream = upstream

    @property
    def grad(self) -> Tensor:
        """The gradient, until it is taken."""
        assert self._grad is not None
        return self._grad

    def take(self) -> Tensor:
        """The gradient, for good."""
        grad, self._grad = self.grad, None
        return grad

    def __del__(self) -> None:
        """Made for nothing."""
        if self._grad is not None:
            self._expectation.wait(AFTER_NOTHING)


class Expectation:
    """What upstream gradient the next backward will bring."""

    def __init__(self) -> None:
        """`loss.backward()`."""
        self.upstream = 1.0
        self._to_come = 0
        self._waiting: weakref.ref[Ahead] | None = None

    @property
    def steady(self) -> bool:
        """Whether a gradient is worth making in forward."""
        return self._to_come == 0

    @property
    def moderate_upstream(self) -> float:
        """What is expected, or 1 where a gradient for that could not be scaled to another without loss."""
        return self.upstream if 2**-20 <= abs(self.upstream) <= 2**20 else 1.0

    def start(self, logits: Tensor) -> Ahead | None:
        """Memory for a gradient, if it is worth making now."""
        if not self.steady or saved_tensor_hooks(True) is not None:
            return None
        large = logits.nbytes >= RECYCLED_FROM
        if large and self._waiting is not None and self._waiting() is not None:
            return None
        ahead = Ahead(fresh(logits), self.upstream, self)
        if large:
            self._waiting = weakref.ref(ahead)
        return ahead

    def learn(self, upstream: float) -> None:
        """What a backward brought; 0 and what is not finite are no guide to the next."""
        if upstream == self.upstream:
            self._to_come = max(0, self._to_come - 1)
            return
        self.wait(1)
        if upstream != 0.0 and math.isfinite(upstream):
            self.upstream = upstream

    def wait(self, steps: int) -> None:
        """Makes none until so many backwards have brought what was expected."""
        self._to_come = max(self._to_come, steps)


class OnGpu(NamedTuple):
    """Numbers that the kernel of a gradient compares and writes."""

    made_for: Tensor | None  # None: forward made no gradient
    next: Tensor
    surprised: Tensor


class ExpectationOfGpu(Expectation):
    """The same where kernels alone see numbers.

    Streams need no order: what forward reads, whenever that is, it keeps beside the gradient for backward to compare. A CUDA
    graph reads and writes the same memory at each replay.
    """

    def __init__(self, device: torch.device) -> None:
        """Memory that stays."""
        super().__init__()
        self._next = torch.ones((), dtype=torch.float64, device=device)
        self._surprised = torch.zeros((), dtype=torch.int32, device=CPU, pin_memory=device.type == "cuda")

    @property
    def steady(self) -> bool:
        """Whether a gradient is worth making in forward, as far as is known by now."""
        return super().steady and not self._surprised.item()

    def start(self, logits: Tensor) -> Ahead | None:
        """As there; what is expected now stays beside the gradient."""
        ahead = super().start(logits)
        if ahead is not None:
            ahead.upstream = self._next.clone()
        return ahead

    def of_backward(self, ahead: Ahead | None) -> OnGpu:
        """For the kernel of one backward."""
        self._to_come = max(0, self._to_come - 1)
        made_for = None if ahead is None else ahead.upstream
        assert not isinstance(made_for, float)
        return OnGpu(made_for, self._next, self._surprised)


expectation = Expectation()
_of_gpus: dict[torch.device, ExpectationOfGpu] = {}


def expectation_of(logits: Tensor) -> Expectation | None:
    """That of their device; None where the first to need it is a CUDA graph in the making, whose memory would not be ours."""
    if logits.is_cpu:
        return expectation
    device = logits.device
    if device not in _of_gpus:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return None
        _of_gpus[device] = ExpectationOfGpu(device)
    return _of_gpus[device]
