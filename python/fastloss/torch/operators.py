# SPDX-License-Identifier: Apache-2.0
"""The functions of `ops` as operators of PyTorch: for tracing, `torch.compile`, `torch.func` and `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._options import NONE, STATISTICS, row_shape
from fastloss.torch import ops
from fastloss.torch.ops import Options, accumulation_dtype

LIBRARY = torch.library.Library("fastloss", "DEF")
DIFFERENTIABLE = STATISTICS[:6]
BY_STATISTICS = ", ".join(f"Tensor by_{name}" for name in DIFFERENTIABLE)
SAVED_STATISTICS = "Tensor saved, Tensor entropy, Tensor sum_sq_prob, Tensor max_prob, Tensor argmax"
NAMED_STATISTICS = f"({', '.join(f'Tensor {name}' for name in (*STATISTICS, 'saved'))})"
_OPTIONS = "int dim, int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature"
_ROWS = f"Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor? bias, Tensor saved, Tensor scale, {_OPTIONS}"
_TRANSFORM = "int dim, float softcap, float temperature"
LIBRARY.define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? bias, {_OPTIONS}, int reduction, float? denominator)"
    " -> (Tensor loss, Tensor saved, Tensor scale)"
)
LIBRARY.define(f"cross_entropy_backward({_ROWS}) -> Tensor")
LIBRARY.define(f"soft_target_gradient({_ROWS}) -> Tensor")
LIBRARY.define(f"statistics(Tensor logits, Tensor? target, Tensor? bias, {_TRANSFORM}, int[] want) -> {NAMED_STATISTICS}")
LIBRARY.define(
    f"statistics_backward({BY_STATISTICS}, Tensor logits, Tensor? target, Tensor? bias, {SAVED_STATISTICS}, {_TRANSFORM},"
    " int[] want) -> Tensor"
)


def as_tensor(scale: float | Tensor) -> Tensor:
    """The factor of a loss as the operators take it."""
    return scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device=ops.CPU)


def ids_in_order(target: Tensor) -> Tensor:
    """Class ids as the functions take them; transforms, and zero tensors made real, have strides of their own."""
    return target if target.dtype in ops.CODES else target.contiguous()


def factor(scale: Tensor) -> float | Tensor:
    """The factor of a loss as the functions take it."""
    return scale.item() if scale.is_cpu else scale


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, reduction, denominator = rest
    loss, saved, scale = ops.cross_entropy(
        logits, ids_in_order(target), weight, bias, Options(*options), reduction, denominator, True
    )
    assert saved is not None
    return loss, saved, as_tensor(scale)


def _cross_entropy_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = row_shape(logits.shape, args[3])
    loss = logits.new_empty(rows if args[-2] == NONE else (), dtype=accumulation_dtype(logits.dtype))
    saved = logits.new_empty((*rows, ops.saved_width(logits, logits.shape[args[3]])), dtype=torch.float64)
    return loss, saved, logits.new_empty((), dtype=torch.float64)


def _row_gradient(name: str) -> Callable[..., Tensor]:
    def gradient(*args: Any) -> Tensor:
        upstream, logits, target, *parameters, saved, scale = args[:7]
        tensors = (upstream, logits, ids_in_order(target), *parameters)
        options = args[7:]
        grad: Tensor = getattr(ops, name)(*tensors, saved.contiguous(), factor(scale), Options(*options))
        return grad

    return gradient


def _statistics(*args: Any) -> tuple[Tensor, ...]:
    return tuple(ops.statistics(*args))


def _statistics_fake(logits: Tensor, target: Tensor | None, bias: Any, dim: int, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(ops.stats_outputs(logits, target, dim, rest[-1]))


def _statistics_backward(*args: Any) -> Tensor:
    upstreams, (logits, target, bias), of_rows, (*transform, want) = args[:6], args[6:9], args[9:14], args[14:]
    coefficients, ids, factors = statistics_coefficients(upstreams, want, target, logits.shape[transform[0]], *of_rows)
    return ops.gradient(logits, of_rows[0], coefficients, ids, factors, bias, *transform)


def statistics_coefficients(
    upstreams: Sequence[Tensor],
    want: Sequence[bool],
    target: Tensor | None,
    classes: int,
    saved: Tensor,
    entropy: Tensor,
    sum_sq_prob: Tensor,
    max_prob: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Four numbers a row, and ids with one number each, that the gradient kernel makes the gradient of."""
    rows = saved.shape[:-1]
    u = [upstream.to(torch.float64) for upstream in upstreams]
    a, b, c, d = (torch.zeros_like(saved[..., 0]) for _ in range(4))
    ids: list[Tensor] = []
    g: list[Tensor] = []
    if want[0] and target is not None:
        many = target.ndim == len(rows) + 1
        per_id = u[0] if many else u[0].unsqueeze(-1)
        a = a - per_id.sum(-1)
        g.append(-per_id)
        ids.append((target if many else target.unsqueeze(-1)).long())
    if want[1]:
        a = a + u[1]
    if want[2]:
        a = a + u[2] * (torch.log1p(saved[..., 1]) - entropy)
        b = b - u[2]
    if want[3]:
        d = d + u[3] / classes
    if want[4]:
        a = a - 2 * u[4] * sum_sq_prob
        c = c + 2 * u[4]
    if want[5]:
        a = a - u[5] * max_prob
        g.append(-(u[5] * max_prob).unsqueeze(-1))
        ids.append(argmax.clamp(min=0).unsqueeze(-1))
    coefficients = torch.stack([a, b, c, d], -1)
    return (coefficients, torch.cat(ids, -1), torch.cat(g, -1)) if ids else (coefficients, None, None)


for _name, _function, _fake in (
    ("cross_entropy", _cross_entropy, _cross_entropy_fake),
    ("cross_entropy_backward", _row_gradient("cross_entropy_backward"), lambda *args: torch.empty_like(args[1])),
    ("soft_target_gradient", _row_gradient("soft_target_gradient"), lambda *args: torch.empty_like(args[2])),
    ("statistics", _statistics, _statistics_fake),
    ("statistics_backward", _statistics_backward, lambda *args: torch.empty_like(args[6])),
):
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"fastloss::{_name}", _fake)
