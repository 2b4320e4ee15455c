# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy: fastloss, exact and sampled; PyTorch with the logits stored, and PyTorch's own in chunks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fastloss.torch import linear_cross_entropy

from ..linear.jobs import HeadLoss, LossAndGradients
from . import Bound, Peer

REFERENCE, CHUNKED = "F.linear + F.cross_entropy", "F.linear_cross_entropy, chunked"
EXACT, SAMPLED = "fastloss exact", "fastloss sampled"
OPERATION = "linear"

# Logits in bfloat16 have an error of 2^-5 near 10, and so have the probabilities. Eager adds errors of its own.
BOUNDS = {"float32": Bound(1e-5, 1e-3), "bfloat16": Bound(2e-3, 4e-2)}
EAGER_BOUNDS = {"float32": Bound(1e-5, 1e-3), "bfloat16": Bound(2e-2, 0.25)}
# PyTorch adds up the losses of its chunks in bfloat16.
CHUNKED_BOUNDS = EAGER_BOUNDS | {"bfloat16": Bound(0.1, 0.25)}
# The bias of a sample of 256 tokens and 8192 classes has a standard deviation of about 0.02.
SAMPLED_BOUNDS = {"float32": Bound(1e-5, 0.1), "bfloat16": Bound(2e-3, 0.1)}


def _stored(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _peer(name: str, function: HeadLoss, bounds: dict[str, Bound], order: int, **traits: bool) -> Peer:
    return Peer(name, {OPERATION: partial(LossAndGradients, function)}, bounds, order=order, **traits)


def peers() -> list[Peer]:
    found = [
        _peer(EXACT, linear_cross_entropy, BOUNDS, 20),
        _peer(SAMPLED, partial(linear_cross_entropy, backward="sampled"), SAMPLED_BOUNDS, 21, sampled=True),
        _peer(REFERENCE, _stored, EAGER_BOUNDS, 47, slow=True),
    ]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since PyTorch 2.13
        chunked = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        found.append(_peer(CHUNKED, chunked, CHUNKED_BOUNDS, 48, once=True))
    return found
