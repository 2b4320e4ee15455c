# SPDX-License-Identifier: Apache-2.0
"""The operators under `vmap`: a batch is more rows. Importing this registers the rules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss._options import MEAN, NONE
from fastloss.torch import linear_operators, plain
from fastloss.torch.ops import accumulation_dtype


def _front(value: Any, in_dim: int | None, size: int) -> Any:
    """The batch dimension in front; tensors without one are expanded."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)


def _cross_entropy_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    size = info.batch_size
    op = torch.ops.fastloss.cross_entropy
    if in_dims[2] is not None or in_dims[3] is not None:
        return _in_turn(op)(info, in_dims, *args)
    logits, target = (_front(args[i], in_dims[i], size) for i in (0, 1))
    target = target.contiguous()
    weight, bias, dim, ignore_index, *options, reduction, denominator = args[2:]
    loss, saved, scale = op(logits, target, weight, bias, dim + 1, ignore_index, *options, NONE, None)
    scale = scale.expand(size)
    if reduction != NONE:
        of_sample = (size, math.prod(loss.shape[1:]))
        total = loss.reshape(of_sample).to(torch.float64).sum(1)
        if reduction == MEAN:
            if denominator is None:
                counted = plain.denominators(loss, target, weight, ignore_index).reshape(of_sample).sum(1)
            else:
                counted = torch.full_like(total, denominator)
            total = plain.mean(total, counted)
            scale = torch.where(counted == 0, 0, 1 / counted)
        loss = total.to(accumulation_dtype(logits.dtype))
    return (loss, saved, scale), (0, 0, 0)


def _row_gradient_vmap(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[3] is not None or in_dims[4] is not None:
            return _in_turn(op)(info, in_dims, *args)
        size = info.batch_size
        upstream, logits, target, _, _, saved, scale = (_front(a, d, size) for a, d in zip(args[:7], in_dims, strict=False))
        rows = saved.shape[:-1]
        factor = upstream * scale.reshape(size, *[1] * (upstream.ndim - 1))
        factor = factor.reshape(size, *([1] * (len(rows) - 1) if upstream.ndim == 1 else rows[1:])).expand(rows)
        one = torch.ones((), dtype=torch.float64, device=upstream.device)
        tensors = (factor.contiguous(), logits, target.contiguous(), *args[3:5], saved.contiguous(), one)
        return op(*tensors, args[7] + 1, *args[8:]), 0

    return rule


def _statistics_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    op = torch.ops.fastloss.statistics
    if in_dims[2] is not None:
        return _in_turn(op)(info, in_dims, *args)
    logits, target = (_front(args[i], in_dims[i], info.batch_size) for i in (0, 1))
    outputs = op(logits, target, args[2], args[3] + 1, *args[4:])
    wanted = (*args[6], True)
    unwanted = (out.new_empty((info.batch_size, 0)) for out in outputs)
    return tuple(out if w else none for out, none, w in zip(outputs, unwanted, wanted, strict=True)), (0,) * len(outputs)


def _statistics_backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    op = torch.ops.fastloss.statistics_backward
    if in_dims[8] is not None:
        return _in_turn(op)(info, in_dims, *args)
    bias, dim = args[8], args[14]
    tensors = [_front(a, d, info.batch_size) for a, d in zip(args[:14], in_dims, strict=False)]
    return op(*tensors[:8], bias, *tensors[9:], dim + 1, *args[15:]), 0


def _in_turn(op: Any) -> Any:
    """One sample after the other, where samples share nothing that could be computed together."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        # No sample at all: the shapes are those of one.
        results = [op(*(_sample(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size or 1)]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        outputs = tuple(_stacked(parts)[:size] for parts in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _sample(value: Any, in_dim: Any, i: int) -> Any:
    if not isinstance(value, Tensor) or in_dim is None:
        return value
    if value.shape[in_dim] == 0:
        return value.new_zeros([*value.shape[:in_dim], *value.shape[in_dim + 1 :]])
    return value.select(in_dim, i)


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """Side by side; sampled entries, of which samples have different numbers, with zeros after the last."""
    if parts[0].ndim == 1:
        longest = max(map(len, parts))
        parts = tuple(torch.nn.functional.pad(part, (0, longest - len(part))) for part in parts)
    return torch.stack(parts)


torch.library.register_vmap("fastloss::cross_entropy", _cross_entropy_vmap)
torch.library.register_vmap("fastloss::statistics", _statistics_vmap)
torch.library.register_vmap("fastloss::statistics_backward", _statistics_backward_vmap)
for _name in ("cross_entropy_backward", "soft_target_gradient"):
    torch.library.register_vmap(f"fastloss::{_name}", _row_gradient_vmap(getattr(torch.ops.fastloss, _name)))
for _name in linear_operators.OPERATORS:
    torch.library.register_vmap(f"fastloss::{_name}", _in_turn(getattr(torch.ops.fastloss, _name)))
