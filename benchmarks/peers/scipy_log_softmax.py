# SPDX-License-Identifier: Apache-2.0
"""NumPy users' usual way: `scipy.special.log_softmax` and fancy indexing. One thread, since NumPy has one."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax

from ..cases import Case
from ..jobs import Job, Unsupported
from . import Bound, Peer


class ScipyLoss(Job):
    """Mean of the negative log-probabilities of the targets."""

    floor_reads = 1

    def __init__(self, case: Case) -> None:
        if case.dtype != "float32" or len(case.shape) != 2:
            raise Unsupported("only float32 matrices")
        self.logits, self.target = case.logits.numpy(), case.target.numpy()
        self.gradient: np.ndarray | None = None

    def log_probabilities(self) -> np.ndarray:
        logprob = log_softmax(self.logits, axis=1)
        self.loss = -logprob[np.arange(len(logprob)), self.target].mean(dtype=np.float64)
        return logprob

    def run(self) -> None:
        self.log_probabilities()

    def answer(self) -> tuple[float, torch.Tensor | None]:
        return float(self.loss), None if self.gradient is None else torch.from_numpy(self.gradient)

    def release(self) -> None:
        self.gradient = None


class ScipyGradient(ScipyLoss):
    """The same, and the gradient `(exp(log p) - onehot) / N`, in place where NumPy can."""

    floor_reads = 0
    floor_updates = 1

    def run(self) -> None:
        gradient = self.log_probabilities()
        np.exp(gradient, out=gradient)
        gradient[np.arange(len(gradient)), self.target] -= 1
        gradient /= len(gradient)
        self.gradient = gradient


def peers() -> list[Peer]:
    jobs = {"loss": ScipyLoss, "gradient": ScipyGradient}
    return [Peer("scipy log_softmax", jobs, {"float32": Bound(1e-5, 1e-3)}, slow=True, order=45)]
