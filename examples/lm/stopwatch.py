# SPDX-License-Identifier: Apache-2.0
"""Times of the parts of a step, without changing what autograd does.

Forward: around the call. Backward: it starts at the loss, so the gradient of the loss is done when the gradient of the
logits arrives (a hook on the logits), and that of head and loss when the gradient of the hidden states arrives.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Seconds of one step. `loss_seconds` stays 0 where no logits are stored: the loss is within the head then."""

    def __init__(self) -> None:
        self.loss_seconds = 0.0
        self.head_seconds = 0.0
        self._backward_start = 0.0

    def loss(self, logits: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Calls the loss; counts it, and its backward pass, as time in the loss."""
        logits.register_hook(self._loss_is_done)
        start = time.perf_counter()
        value = call()
        self.loss_seconds += time.perf_counter() - start
        return value

    def head(self, hidden: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Calls head and loss together; counts them, and their backward pass, as time in the head."""
        hidden.register_hook(self._head_is_done)
        start = time.perf_counter()
        value = call()
        self.head_seconds += time.perf_counter() - start
        return value

    def backward(self, value: torch.Tensor) -> None:
        """`value.backward()`."""
        self._backward_start = time.perf_counter()
        value.backward()

    def _loss_is_done(self, gradient: torch.Tensor) -> None:
        self.loss_seconds += time.perf_counter() - self._backward_start

    def _head_is_done(self, gradient: torch.Tensor) -> None:
        self.head_seconds += time.perf_counter() - self._backward_start
