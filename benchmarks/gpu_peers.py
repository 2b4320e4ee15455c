# SPDX-License-Identifier: Apache-2.0
"""Who is measured on a GPU. A peer is a function that makes its operations; where its package is missing, it is left out.

An operation takes (logits, target) and returns the mean loss; a gradient comes by `loss.backward()` from logits that need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]


def _rows_last(function: LossFunction) -> LossFunction:
    """For peers that know `[rows, classes]` alone."""

    def flat(logits: Tensor, target: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise NotImplementedError("[rows, classes] only")
        return function(logits, target)

    return flat


def fastloss() -> Mapping[str, LossFunction]:
    import fastloss.torch as fl

    return {
        "loss": fl.cross_entropy,
        "gradient": fl.cross_entropy,
        "gradient in place": partial(fl.cross_entropy, inplace=True),
        "gradient in place, in backward": partial(fl.cross_entropy, inplace="backward"),
    }


def eager() -> Mapping[str, LossFunction]:
    return {"loss": F.cross_entropy, "gradient": F.cross_entropy}


def compiled() -> Mapping[str, LossFunction]:
    torch._dynamo.reset()  # or it would run eagerly once it has compiled for so many sizes
    function = torch.compile(F.cross_entropy, dynamic=False)
    return {"loss": function, "gradient": function}


def liger() -> Mapping[str, LossFunction]:
    """Makes its gradient over the logits, in the trip of the loss."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return {"loss": _rows_last(liger_cross_entropy), "gradient in place": _rows_last(liger_cross_entropy)}


def quack() -> Mapping[str, LossFunction]:
    from quack.cross_entropy import cross_entropy

    return {
        "loss": _rows_last(lambda logits, target: cross_entropy(logits, target, reduction="mean")),
        "gradient": _rows_last(lambda logits, target: cross_entropy(logits, target, reduction="mean")),
        "gradient in place, in backward": _rows_last(
            lambda logits, target: cross_entropy(logits, target, reduction="mean", inplace_backward=True)
        ),
    }


PEERS: dict[str, Callable[[], Mapping[str, LossFunction]]] = {
    "fastloss": fastloss,
    "PyTorch eager": eager,
    "torch.compile": compiled,
    "liger-kernel": liger,
    "quack-kernels": quack,
}


# ---- linear cross-entropy: (hidden, weight, target) to the mean loss --------------------------------------------------

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_fastloss() -> LinearLoss:
    import fastloss.torch as fl

    return fl.linear_cross_entropy


def linear_fastloss_sampled() -> LinearLoss:
    import fastloss.torch as fl

    return partial(fl.linear_cross_entropy, backward="sampled")


def linear_eager() -> LinearLoss:
    return lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target)


def linear_chunked() -> LinearLoss:
    """PyTorch's own in chunks."""
    try:
        options = torch.nn.LinearCrossEntropyOptions()
    except AttributeError as error:
        raise ImportError("needs PyTorch 2.13") from error
    return partial(F.linear_cross_entropy, options=options)


def linear_cce() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def linear_liger() -> LinearLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def linear_quack() -> LinearLoss:
    """Its fastest way; where that does not take the sizes (0.6.4: as many tokens as features), the one without it."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        square = hidden.shape[0] == hidden.shape[1]
        options = {"use_scaled_exp": False, "tuned": False} if square else {}
        return chunked_linear_cross_entropy(hidden, weight, target, **options)

    return loss


LINEAR_PEERS: dict[str, Callable[[], LinearLoss]] = {
    "fastloss exact": linear_fastloss,
    "fastloss sampled": linear_fastloss_sampled,
    "PyTorch eager": linear_eager,
    "PyTorch chunked": linear_chunked,
    "liger-kernel": linear_liger,
    "cut-cross-entropy": linear_cce,
    "quack-kernels": linear_quack,
}
