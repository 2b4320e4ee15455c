# SPDX-License-Identifier: Apache-2.0
"""The losses as plain differentiable PyTorch: correct, and slower, with all logits in memory several times.

Second derivatives go through here, forward mode, and gradients by class weights; nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._options import MEAN, NONE
from fastloss.torch.ops import CODES, Options, accumulation_dtype


def transformed(logits: Tensor, dim: int, softcap: float, temperature: float, bias: Tensor | None) -> Tensor:
    """z, classes last, in the accumulation type."""
    z = logits.movedim(dim, -1).to(accumulation_dtype(logits.dtype)) / temperature
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if bias is None else z + bias


def counted(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Rows, and zeros for those that do not count: what is in them, NaN perhaps, reaches no derivative."""
    return rows if target.dtype in CODES else torch.where((target != ignore_index).unsqueeze(-1), rows, 0)


def row_losses(logits: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """The loss of each row."""
    dim, ignore_index, smoothing, z_loss, softcap, temperature = options
    z = counted(transformed(logits, dim, softcap, temperature, bias), target, ignore_index)
    gap = -torch.log_softmax(z, -1)  # no difference of large numbers, whatever the logits have in common
    weights = torch.ones(z.shape[-1], dtype=z.dtype, device=z.device) if weight is None else weight
    square = z_loss * torch.logsumexp(z, -1) ** 2 if z_loss else torch.zeros_like(gap[..., 0])
    smooth = times(smoothing / z.shape[-1] * weights, gap).sum(-1) if smoothing else torch.zeros_like(square)
    own = 1 - smoothing
    if target.dtype in CODES:
        probabilities = target.movedim(dim, -1).to(z.dtype)
        return times(own * weights * probabilities, gap).sum(-1) + smooth + square
    counts = target != ignore_index
    ids = torch.where(counts, target, 0)
    picked = pick(gap, ids.unsqueeze(-1)).squeeze(-1)  # first: it raises for a negative id, too
    of_class = pick(weights, ids)
    losses = times(own * of_class, picked) + of_class * square + smooth
    return torch.where(counts, losses, 0)


def pick(values: Tensor, ids: Tensor) -> Tensor:
    """The numbers of these classes; an id out of range raises IndexError, but on a GPU."""
    return look_up_or_nan(values, ids) if ids.is_cuda else look_up(values, ids)


def look_up(values: Tensor, ids: Tensor) -> Tensor:
    """Numbers of one row, or of each row."""
    return values[ids.long()] if values.ndim == 1 else values.gather(-1, ids.long())


def look_up_or_nan(values: Tensor, ids: Tensor) -> Tensor:
    """As `look_up`; NaN, and so are derivatives, for an id out of range: a GPU that meets one is lost to the process."""
    there = (ids >= 0) & (ids < values.shape[-1])
    return look_up(values, torch.where(there, ids, 0)) * torch.where(there, values.new_ones(()), math.nan)


def times(factor: Tensor, gap: Tensor) -> Tensor:
    """The product, 0 where a factor of 0 meets a gap of infinity."""
    return factor * torch.where((factor == 0) & (gap == math.inf), 0, gap)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    """The logits of all tokens, without what the hidden states of those that do not count hold."""
    return torch.nn.functional.linear(counted(hidden, target, ignore_index), weight, bias)


def scaled_losses(
    tensors: Sequence[Any], places: Sequence[int], bias: Tensor | None, scale: Tensor, options: Options
) -> Callable[..., Tensor]:
    """The loss of each row times a factor, as a function of those of (logits, target, weight) at these places."""

    def losses(*variables: Tensor) -> Tensor:
        given = list(tensors)
        for place, variable in zip(places, variables, strict=True):
            given[place] = variable
        logits, target, weight = given
        rows = row_losses(logits, target, weight, bias, options)
        scaled: Tensor = rows * scale.to(rows.dtype)
        return scaled

    return losses


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    reduction: int,
    denominator: float | None,
) -> Tensor:
    """The loss."""
    rows = row_losses(logits, target, weight, bias, options)
    if reduction == NONE:
        return rows
    total = rows.to(torch.float64).sum()
    if denominator is not None:
        total = total / denominator
    elif reduction == MEAN:
        total = mean(total, denominators(rows, target, weight, options.ignore_index).sum())
    return total.to(rows.dtype)


def mean(total: Tensor, count: Tensor) -> Tensor:
    """NaN where nothing counts, with a gradient of 0."""
    nothing = count == 0
    return (total / count.masked_fill(nothing, 1).to(total.dtype)).masked_fill(nothing, math.nan)


def denominators(rows: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row adds to the denominator of the mean."""
    if target.dtype in CODES:
        return torch.ones_like(rows, dtype=torch.float64)
    counts = target != ignore_index
    if weight is None:
        return counts.to(torch.float64)
    return torch.where(counts, pick(weight.to(torch.float64), torch.where(counts, target, 0)), 0)


def statistics(
    logits: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    dim: int,
    softcap: float,
    temperature: float,
    want: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The wanted ones of the six differentiable statistics, in the order of LogitStats."""
    z = transformed(logits, dim, softcap, temperature, bias)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()

    def logprob() -> Tensor:
        assert target is not None
        return pick(log_p, target) if target.ndim == log_p.ndim else pick(log_p, target.unsqueeze(-1)).squeeze(-1)

    formulas: list[Callable[[], Tensor]] = [
        logprob,
        lambda: torch.logsumexp(z, -1),
        lambda: -(p * torch.where(p > 0, log_p, 0)).sum(-1),
        lambda: z.mean(-1),
        lambda: (p * p).sum(-1),
        lambda: p.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1),
    ]
    return tuple(formula() for formula, wanted in zip(formulas, want[: len(formulas)], strict=True) if wanted)


def all_statistics(logits: Tensor, target: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The outputs of the operator, those that are differentiable from their formulas."""
    found = iter(statistics(logits, target, bias, *rest))
    outputs = torch.ops.fastloss.statistics(logits.detach(), target, bias, *rest)
    differentiable = [next(found) if wanted else out for out, wanted in zip(outputs[:6], rest[-1][:6], strict=True)]
    return *differentiable, *outputs[6:]


def vjp_of_vjp(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], upstream: Any, cotangents: tuple[Tensor | None, ...]
) -> tuple[Any, tuple[Tensor, ...]]:
    """Gradients, by `upstream` and by `inputs`, of the inner product of `cotangents` with the gradient of `function`."""

    def gradients(upstream: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        pull_back = torch.func.vjp(function, *inputs)[1]
        return tuple(g for g, cotangent in zip(pull_back(upstream), cotangents, strict=True) if cotangent is not None)

    pull_back = torch.func.vjp(gradients, upstream, *inputs)[1]
    by_upstream, *by_inputs = pull_back(tuple(c for c in cotangents if c is not None))
    return by_upstream, tuple(by_inputs)
