# SPDX-License-Identifier: Apache-2.0
"""The PyTorch API: the losses and statistics of `fastloss`, on tensors, with autograd."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("fastloss.torch needs PyTorch: pip install fastloss[torch]") from error

from fastloss._options import LogitStats
from fastloss.torch.cross_entropy import CrossEntropyLoss, cross_entropy
from fastloss.torch.linear import linear_cross_entropy, linear_logit_stats
from fastloss.torch.linear_module import LinearCrossEntropyLoss
from fastloss.torch.stats import entropy_from_logits, logit_stats, selective_log_softmax

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogitStats",
    "cross_entropy",
    "entropy_from_logits",
    "linear_cross_entropy",
    "linear_logit_stats",
    "logit_stats",
    "selective_log_softmax",
]
