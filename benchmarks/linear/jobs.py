"""What is timed: loss with both gradients, and the bare products that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastloss._chunks import slices
from fastloss.torch.matmul import _PRODUCTS, _blas_logits, _own_logits, weight_product

from ..jobs import Job
from .case import LinearCase

HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ROLES = ("logits", "hidden", "weight")
BLOCKS, OWN = "blocks", "fastloss"


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


def _by_blocks(grad: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    weight_product(grad, hidden, None, out, add=add, last=True)


class Product(Job):
    """One of the three products by one library, so many tokens at a time: no sum over chunks, no loss, no fresh memory."""

    def __init__(self, case: LinearCase, buffers: Buffers, role: str, library: str, tokens: int) -> None:
        self.case, self.buffers, self.role, self.tokens = case, buffers, role, tokens
        of_role = {"blas": _blas_logits, OWN: _own_logits} if role == "logits" else _PRODUCTS[role]
        self.product = of_role.get(library, _by_blocks)

    def run(self) -> None:
        hidden, weight, room = self.case.hidden, self.case.weight, self.buffers
        for part in slices(len(hidden), self.tokens):
            logits = room.logits[: part.stop - part.start]
            if self.role == "logits":
                self.product(hidden[part], weight, None, logits)
            elif self.role == "hidden":
                self.product(logits, weight, room.by_hidden[part])
            else:
                self.product(logits, hidden[part], room.by_weight, False)


def products(case: LinearCase) -> dict[tuple[str, str, int], Job]:
    """Each product by each library for this dtype, with all tokens at once and with as many as fastloss takes.

    Those of bfloat16 are PyTorch's; those by which fastloss makes logits and the gradient by the weights come along.
    """
    if case.dtype == "float32":
        libraries = {"logits": ("blas", OWN), "hidden": ("blas", "onednn"), "weight": ("blas", "onednn")}
    else:
        libraries = {"logits": ("blas", OWN), "hidden": ("blas",), "weight": ("blas", BLOCKS)}
    buffers = Buffers(case)
    return {
        (role, library, size): Product(case, buffers, role, library, size)
        for role in ROLES
        for library in libraries[role]
        for size in sorted({case.tokens, case.chunk})
    }
