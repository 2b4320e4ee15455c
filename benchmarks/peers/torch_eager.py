# SPDX-License-Identifier: Apache-2.0
"""PyTorch, eager: `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from ..jobs import TorchGradient, TorchLoss
from . import Bound, Peer

# Eager bfloat16 keeps the row's maximum, sum and logarithm in bfloat16: single gradients are off by several per cent.
BOUNDS = {"float32": Bound(1e-5, 1e-3), "bfloat16": Bound(2e-2, 0.25)}


def peers() -> list[Peer]:
    jobs = {"loss": partial(TorchLoss, F.cross_entropy), "gradient": partial(TorchGradient, F.cross_entropy)}
    return [Peer("torch eager", jobs, BOUNDS, order=40)]
