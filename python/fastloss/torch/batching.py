# SPDX-License-Identifier: Apache-2.0
"""The operators under `vmap`: a batch is more rows. Importing this registers the rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._options import MEAN, NONE
from fastloss.torch import linear_operators
from fastloss.torch.ops import CODES, accumulation_dtype


def _front(value: Any, in_dim: int | None, size: int) -> Any:
    """The batch dimension in front; tensors without one are expanded."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)


def _unbatched(name: str, in_dim: int | None) -> None:
    if in_dim is not None:
        raise NotImplementedError(f"{name} cannot be batched by vmap: it is one number a class, the same for all rows")


def _cross_entropy_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    logits, target = (_front(args[i], in_dims[i], info.batch_size) for i in (0, 1))
    weight, bias, dim, ignore_index, *options, reduction, denominator = args[2:]
    _unbatched("weight", in_dims[2])
    _unbatched("logit_bias", in_dims[3])
    op = torch.ops.fastloss.cross_entropy
    loss, saved, scale = op(logits, target.contiguous(), weight, bias, dim + 1, ignore_index, *options, NONE, None)
    scale = scale.expand(info.batch_size)
    if reduction != NONE:
        loss = loss.flatten(1).to(torch.float64).sum(1)
        if reduction == MEAN:
            counted = _counted(loss, target, weight, ignore_index, denominator, saved[0, ..., 0].numel())
            loss = loss / counted
            scale = torch.where(counted == 0, 0, 1 / counted)
        loss = loss.to(accumulation_dtype(logits.dtype))
    return (loss, saved, scale), (0, 0, 0)


def _counted(
    loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, denominator: float | None, rows: int
) -> Tensor:
    """The denominator of the mean of each sample."""
    if denominator is not None:
        return torch.full_like(loss, denominator)
    if target.dtype in CODES:
        return torch.full_like(loss, rows)
    counts = target != ignore_index
    weights = counts.to(torch.float64)
    if weight is not None:
        weights = weights * weight.to(torch.float64)[torch.where(counts, target, 0)]
    return weights.flatten(1).sum(1)


def _row_gradient_vmap(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        upstream, logits, target, weight, bias, saved, scale = (
            _front(a, d, size) for a, d in zip(args[:7], in_dims, strict=False)
        )
        if weight is not None:
            _unbatched("weight", in_dims[3])
            weight = args[3]
        if bias is not None:
            _unbatched("logit_bias", in_dims[4])
            bias = args[4]
        rows = saved.shape[:-1]
        factor = upstream.reshape(size, *upstream.shape[1:]) * scale.reshape(size, *[1] * (upstream.ndim - 1))
        factor = factor.reshape(size, *([1] * (len(rows) - 1) if upstream.ndim == 1 else rows[1:])).expand(rows)
        one = torch.ones((), dtype=torch.float64, device=upstream.device)
        out = op(
            factor.contiguous(),
            logits,
            target.contiguous(),
            weight,
            bias,
            saved.contiguous(),
            one,
            args[7] + 1,
            *args[8:],
        )
        return out, 0

    return rule


def _statistics_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    logits, target = (_front(args[i], in_dims[i], info.batch_size) for i in (0, 1))
    _unbatched("bias", in_dims[2])
    outputs = torch.ops.fastloss.statistics(logits, target, args[2], args[3] + 1, *args[4:])
    unwanted = [out.new_empty((info.batch_size, 0)) for out in outputs]
    wanted = [*args[6], True]
    return [out if want else none for out, none, want in zip(outputs, unwanted, wanted, strict=True)], [0] * len(outputs)


def _gradient_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    tensors = [_front(a, d, info.batch_size) for a, d in zip(args[:5], in_dims, strict=False)]
    _unbatched("bias", in_dims[5])
    return torch.ops.fastloss.gradient(*tensors, args[5], args[6] + 1, *args[7:]), 0


def _in_turn(op: Any) -> Any:
    """One sample after the other: a linear loss shares nothing between samples that could be computed together."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        def of_sample(i: int) -> Any:
            return op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        results = [of_sample(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = [_stacked(parts) for parts in zip(*results, strict=True)]
        return type(results[0])(outputs), type(results[0])([0] * len(outputs))

    return rule


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """Side by side; sampled entries, of which samples have different numbers, with zeros after the last."""
    if parts[0].ndim == 1:
        longest = max(map(len, parts))
        parts = tuple(torch.nn.functional.pad(part, (0, longest - len(part))) for part in parts)
    return torch.stack(parts)


torch.library.register_vmap("fastloss::cross_entropy", _cross_entropy_vmap)
torch.library.register_vmap("fastloss::statistics", _statistics_vmap)
torch.library.register_vmap("fastloss::gradient", _gradient_vmap)
for _name in ("cross_entropy_backward", "soft_target_gradient"):
    torch.library.register_vmap(f"fastloss::{_name}", _row_gradient_vmap(getattr(torch.ops.fastloss, _name)))
for _name in linear_operators.OPERATORS:
    torch.library.register_vmap(f"fastloss::{_name}", _in_turn(getattr(torch.ops.fastloss, _name)))
