# SPDX-License-Identifier: Apache-2.0
"""fastloss through PyTorch's autograd."""

from __future__ import annotations

from functools import partial

from fastloss.torch import cross_entropy

from ..jobs import TorchGradient, TorchGradientInBackward, TorchGradientInPlace, TorchLoss
from . import Peer
from .fastloss_numpy import BOUNDS


def peers() -> list[Peer]:
    in_place = partial(TorchGradientInPlace, partial(cross_entropy, inplace=True))
    in_backward = partial(TorchGradientInBackward, partial(cross_entropy, inplace="backward"))
    jobs = {"loss": partial(TorchLoss, cross_entropy), "gradient": partial(TorchGradient, cross_entropy)}
    return [
        Peer("fastloss", jobs, BOUNDS, order=10),
        Peer("fastloss in place", {"gradient in place": in_place}, BOUNDS, order=11),
        Peer("fastloss in backward", {"gradient in place": in_backward}, BOUNDS, order=12),
    ]
