# SPDX-License-Identifier: Apache-2.0
"""optax on JAX, jitted: `optax.softmax_cross_entropy_with_integer_labels`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from ..cases import Case
from ..jobs import Job, Unsupported
from . import Peer
from .torch_eager import BOUNDS


@jax.jit
def _loss(logits: Any, target: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


_loss_and_gradient = jax.jit(jax.value_and_grad(_loss))


class OptaxLoss(Job):
    """The loss alone, waited for."""

    floor_reads = 1

    def __init__(self, case: Case) -> None:
        if len(case.shape) != 2:
            raise Unsupported("only matrices")
        self.logits = jnp.from_dlpack(case.logits)
        self.target = jnp.asarray(case.target.numpy())

    def run(self) -> None:
        self.loss = jax.block_until_ready(_loss(self.logits, self.target))

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss), None


class OptaxGradient(OptaxLoss):
    """`value_and_grad` in one compiled function, into memory that JAX allocates."""

    floor_reads = 0
    floor_updates = 1

    def run(self) -> None:
        self.loss, self.gradient = jax.block_until_ready(_loss_and_gradient(self.logits, self.target))

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss), torch.from_dlpack(self.gradient)

    def release(self) -> None:
        self.gradient = None


def peers() -> list[Peer]:
    return [Peer("optax (jax)", {"loss": OptaxLoss, "gradient": OptaxGradient}, BOUNDS, order=46, apart=True)]
