# SPDX-License-Identifier: Apache-2.0
"""What is timed: loss with both gradients, and the bare products that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastloss._chunks import slices
from fastloss.torch import matmul

from ..jobs import Job
from .case import LinearCase

HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ROLES = ("logits", "hidden", "weight")
BLAS, ONEDNN, OWN = "blas", "onednn", "fastloss"


class LossAndGradients(Job):
    """`loss = f(hidden, weight, target); loss.backward()`, both factors leaves whose `.grad` is None."""

    def __init__(self, function: HeadLoss, case: LinearCase) -> None:
        self.function, self.target = function, case.target
        self.hidden = case.hidden.detach().requires_grad_()
        self.weight = case.weight.detach().requires_grad_()

    def run(self) -> None:
        self.loss = self.function(self.hidden, self.weight, self.target)
        self.loss.backward()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By hidden states and by weights."""
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad

    def release(self) -> None:
        self.loss = self.hidden.grad = self.weight.grad = None


class Buffers:
    """Memory that products read and write, touched before: logits or their gradient, and the gradients of the factors."""

    def __init__(self, case: LinearCase) -> None:
        self.logits = torch.full((case.tokens, case.classes), 1e-3, dtype=case.hidden.dtype)
        self.by_hidden, self.by_weight = torch.zeros_like(case.hidden), torch.zeros_like(case.weight)


class Product(Job):
    """One of the three products by one library, so many tokens at a time: no sum over chunks, no loss, no fresh memory."""

    def __init__(self, case: LinearCase, buffers: Buffers, role: str, library: str, tokens: int) -> None:
        self.case, self.buffers, self.role, self.library, self.tokens = case, buffers, role, library, tokens

    def run(self) -> None:
        hidden, weight, room = self.case.hidden, self.case.weight, self.buffers
        for part in slices(len(hidden), self.tokens):
            logits = room.logits[: part.stop - part.start]
            if self.library == OWN:
                self._by_fastloss(logits, hidden[part], room.by_hidden[part])
                continue
            left, right, out = {
                "logits": (hidden[part], weight.t(), logits),
                "hidden": (logits, weight, room.by_hidden[part]),
                "weight": (logits.t(), hidden[part], room.by_weight),
            }[self.role]
            if self.library == BLAS:
                torch.mm(left, right, out=out)
            else:
                out.copy_(torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], ""))

    def _by_fastloss(self, logits: torch.Tensor, hidden: torch.Tensor, by_hidden: torch.Tensor) -> None:
        if self.role == "logits":
            matmul.logits_product(hidden, self.case.weight, None, logits)
        elif self.role == "hidden":
            matmul.hidden_product(logits, self.case.weight, by_hidden)
        else:
            matmul.weight_product(logits, hidden, None, self.buffers.by_weight, add=False, last=True)


def products(case: LinearCase) -> dict[tuple[str, str, int], Job]:
    """Each product by each library for this dtype, with all tokens at once and with as many as fastloss takes.

    PyTorch's operator of oneDNN has no fast form of the product that makes the gradient by the weights.
    """
    if case.dtype == "float32":
        libraries = {"logits": (BLAS, ONEDNN, OWN), "hidden": (BLAS, ONEDNN, OWN), "weight": (BLAS, OWN)}
    else:
        libraries = dict.fromkeys(ROLES, (BLAS, OWN))
    buffers = Buffers(case)
    return {
        (role, library, size): Product(case, buffers, role, library, size)
        for role in ROLES
        for library in libraries[role]
        for size in sorted({case.tokens, case.chunk})
    }
