# SPDX-License-Identifier: Apache-2.0
"""The answer comes first: loss and gradients of linear cross-entropy against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..check import Errors
from .case import LinearCase, Part, Reference
from .jobs import LossAndGradients

GradientError = Callable[[torch.Tensor, Part], float]


def measure(job: LossAndGradients, case: LinearCase, sampled: bool) -> Errors:
    """Errors of the last run; a sampled gradient is random, so its bias takes the place of its error."""
    reference: Reference = case.reference
    loss_error = abs(float(job.loss.detach()) / reference.loss - 1)
    error: GradientError = bias if sampled else largest_error
    parts = zip(job.gradients(), (case.hidden, case.weight), (reference.by_hidden, reference.by_weight), strict=True)
    errors = [
        error(gradient, part) if (gradient.shape, gradient.dtype) == (factor.shape, factor.dtype) else math.inf
        for gradient, factor, part in parts
    ]
    return Errors(*(value if math.isfinite(value) else math.inf for value in (loss_error, max(errors))))


def largest_error(gradient: torch.Tensor, part: Part) -> float:
    """The distance of a row from the expected one, relative to its length; the largest."""
    distance = (gradient[part.rows].double() - part.expected).norm(dim=1)
    return float((distance / part.expected.norm(dim=1)).max())


def bias(gradient: torch.Tensor, part: Part) -> float:
    """How far the probabilities in the gradient are from 1 times the right ones, along those, over all rows together.

    The targets, which sampling always keeps, are left out: dropping small probabilities instead would come close to 1.
    """
    distance = gradient[part.rows].double() - part.expected
    return abs(float((distance * part.by_probabilities).sum() / part.by_probabilities.square().sum()))
