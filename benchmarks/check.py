# SPDX-License-Identifier: Apache-2.0
"""The answer comes first: what a job returned, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .cases import Case
from .jobs import Job
from .peers import Bound


@dataclass(frozen=True)
class Errors:
    """Relative errors; `gradient` is the largest over the sampled rows, None where there is no gradient."""

    loss: float
    gradient: float | None

    def within(self, bound: Bound) -> bool:
        """NaN is never within a bound."""
        return self.loss <= bound.loss and (self.gradient is None or self.gradient <= bound.gradient)


def measure(job: Job, case: Case) -> Errors:
    """Runs the job once and compares its loss, and its gradient where it has one, with `case.reference`."""
    job.prepare()
    job.run()
    loss, gradient = job.answer()
    loss_error = abs(loss / case.reference.loss - 1)
    gradient_error = None if gradient is None else _gradient_error(gradient, case)
    job.release()
    return Errors(loss_error if math.isfinite(loss_error) else math.inf, gradient_error)


def _gradient_error(gradient: torch.Tensor, case: Case) -> float:
    if tuple(gradient.shape) != case.shape or gradient.dtype != case.logits.dtype:
        return math.inf
    gradient = gradient.reshape(*case.shape[:2], -1)
    worst = 0.0
    for index, expected in case.reference.slices:
        found = gradient[index, :, :: case.reference.position_step].double()
        error = ((found - expected).abs() / expected.abs().clamp_min(torch.finfo(gradient.dtype).tiny)).max()
        worst = max(worst, float(error.nan_to_num(math.inf)))
    return worst
