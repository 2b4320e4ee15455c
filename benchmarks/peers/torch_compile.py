# SPDX-License-Identifier: Apache-2.0
"""PyTorch under `torch.compile`, compiled anew for each shape, so that it may specialise on it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ..cases import Case
from ..jobs import Job, TorchGradient, TorchLoss
from . import Peer
from .torch_eager import BOUNDS


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


def _compiled(job: type[TorchLoss] | type[TorchGradient], case: Case) -> Job:
    torch.compiler.reset()  # forget other shapes: neither recompilation limits nor dynamic shapes come in
    return job(torch.compile(_cross_entropy, dynamic=False), case)


def peers() -> list[Peer]:
    jobs = {"loss": partial(_compiled, TorchLoss), "gradient": partial(_compiled, TorchGradient)}
    return [Peer("torch.compile", jobs, BOUNDS, order=41)]
