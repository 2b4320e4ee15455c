# SPDX-License-Identifier: Apache-2.0
"""Fused, numerically stable cross-entropy over large vocabularies: the NumPy API.

The PyTorch API is `fastloss.torch`; nothing here imports PyTorch.
"""

from fastloss._options import LogitStats
from fastloss.cross_entropy import cross_entropy
from fastloss.linear import linear_cross_entropy, linear_logit_stats
from fastloss.runtime import available_isas, build_info, get_num_threads, isa, release_memory, set_num_threads
from fastloss.stats import logit_stats

__version__ = build_info()["version"]

__all__ = [
    "LogitStats",
    "available_isas",
    "build_info",
    "cross_entropy",
    "get_num_threads",
    "isa",
    "linear_cross_entropy",
    "linear_logit_stats",
    "logit_stats",
    "release_memory",
    "set_num_threads",
]
