# SPDX-License-Identifier: Apache-2.0
"""Gradients that forward makes in the trip of the loss, for the upstream gradient that it expects.

Of backward a reduced loss needs one number, the upstream gradient: 1 for `loss.backward()`, and mostly the same from step to
step where the loss is scaled. Forward expects that of the last backward. Where it is wrong, backward makes the gradient again
from the logits, in the same memory and to the same bits, and forward makes none until two upstream gradients in a row are
equal. After a gradient that no backward came for it makes none for some steps: a loss that is only logged shall not cost much.
One large gradient waits at a time: losses that wait for a common backward need no more memory than one of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss._options import RECYCLED_FROM
from fastloss.torch.ops import fresh

AFTER_NOTHING = 32  # backwards to wait for
# Checkpointing and offloading take saved tensors away; a gradient in their place would defeat them.
saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None
)


class Ahead:
    """A gradient, and the upstream gradient that it was made for."""

    __slots__ = ("__weakref__", "_grad", "upstream")

    def __init__(self, grad: Tensor, upstream: float) -> None:
        """Memory for the gradient."""
        self._grad: Tensor | None = grad
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
            expectation.wait(AFTER_NOTHING)


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

    def start(self, logits: Tensor) -> Ahead | None:
        """Memory for a gradient, if it is worth making now."""
        if not self.steady or saved_tensor_hooks(True) is not None:
            return None
        large = logits.nbytes >= RECYCLED_FROM
        if large and self._waiting is not None and self._waiting() is not None:
            return None
        ahead = Ahead(fresh(logits), self.upstream)
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


expectation = Expectation()
