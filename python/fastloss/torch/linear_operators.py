# SPDX-License-Identifier: Apache-2.0
"""The functions of `linear_ops` as operators of PyTorch, for tracing, `torch.compile` and `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._options import NONE
from fastloss._sampled import slots_of_token
from fastloss.torch import linear_ops, ops
from fastloss.torch.linear_ops import Head, Task
from fastloss.torch.ops import CODES, LIBRARY, Options, accumulation_dtype
from fastloss.torch.projection import Wanted

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, int? chunk_tokens"
_TASK = (
    "Tensor target, Tensor? class_weight, Tensor? logit_bias, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap, float temperature"
)
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"
_TRANSFORM = "float softcap, float temperature"
LIBRARY.define(
    f"linear_cross_entropy({_HEAD}, {_TASK}, int reduction, float? denominator, {_WANTED})"
    " -> (Tensor loss, Tensor saved, Tensor scale, Tensor by_hidden, Tensor by_weight, Tensor by_bias)"
)
LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor upstream, {_HEAD}, {_TASK}, Tensor saved, Tensor scale, {_WANTED}) -> Tensor[]"
)
LIBRARY.define(f"linear_soft_target_gradient(Tensor upstream, {_HEAD}, {_TASK}, Tensor saved, Tensor scale) -> Tensor")
LIBRARY.define(
    f"linear_cross_entropy_sampled({_HEAD}, {_TASK}, int reduction, float? denominator, float threshold, Tensor seed)"
    " -> (Tensor loss, Tensor scale, Tensor start, Tensor columns, Tensor values)"
)
LIBRARY.define(
    f"linear_sampled_backward(Tensor upstream, {_HEAD}, Tensor start, Tensor columns, Tensor values, Tensor scale, {_WANTED})"
    " -> Tensor[]"
)
LIBRARY.define(f"linear_statistics({_HEAD}, Tensor? target, Tensor? logit_bias, {_TRANSFORM}, bool[] want) -> Tensor[]")
LIBRARY.define(
    f"linear_gradient({_HEAD}, Tensor saved, Tensor coefficients, Tensor? target, Tensor? target_coefficients,"
    f" Tensor? logit_bias, {_TRANSFORM}, {_WANTED}) -> Tensor[]"
)


def grouped(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of an operator, those of Head and Task put together."""
    target, class_weight, logit_bias, *options = arguments[4:12]
    return Head(*arguments[:4]), Task(target, class_weight, logit_bias, Options(1, *options)), *arguments[12:]


def _factor(scale: Tensor) -> float | Tensor:
    """The factor of a loss as the functions take it."""
    return scale if linear_ops.is_on_gpu(scale) else scale.item()


def _cross_entropy_op(*args: Any) -> tuple[Tensor, ...]:
    head, task, reduction, denominator, *wanted = grouped(args)
    (loss, saved, scale), gradients = linear_ops.cross_entropy(head, task, reduction, denominator, Wanted(*wanted))
    return loss, saved, ops.as_tensor(scale), *gradients


def _backward_op(upstream: Tensor, *args: Any) -> list[Tensor]:
    head, task, saved, scale, *wanted = grouped(args)
    return linear_ops.cross_entropy_backward(upstream, head, task, saved, _factor(scale), Wanted(*wanted))


def _soft_target_op(upstream: Tensor, *args: Any) -> Tensor:
    head, task, saved, scale = grouped(args)
    return linear_ops.soft_target_gradient(upstream, head, task, saved, _factor(scale))


def _sampled_op(*args: Any) -> tuple[Tensor, ...]:
    head, task, reduction, denominator, threshold, seed = grouped(args)
    loss, entries = linear_ops.cross_entropy_sampled(head, task, reduction, denominator, threshold, seed)
    return loss.loss, ops.as_tensor(loss.scale), *entries


def _sampled_backward_op(upstream: Tensor, *args: Any) -> list[Tensor]:
    head, (*entries, scale), wanted = Head(*args[:4]), args[4:8], Wanted(*args[8:])
    return linear_ops.sampled_backward(upstream, head, entries, _factor(scale), wanted)


def _statistics_op(*args: Any) -> list[Tensor]:
    return linear_ops.statistics(Head(*args[:4]), *args[4:])


def _gradient_op(*args: Any) -> list[Tensor]:
    saved, coefficients, target, factors, logit_bias, softcap, temperature, *wanted = args[4:]
    terms = (saved, coefficients, target, factors)
    return linear_ops.gradient(Head(*args[:4]), *terms, logit_bias, softcap, temperature, Wanted(*wanted))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *wanted: bool) -> list[Tensor]:
    like = (hidden, weight, weight[:, 0] if bias is None else bias)
    return [t.new_empty(t.shape if want else 0) for t, want in zip(like, wanted, strict=True)]


def _fake_loss(hidden: Tensor, reduction: int) -> Tensor:
    return hidden.new_empty(hidden.shape[:1] if reduction == NONE else (), dtype=accumulation_dtype(hidden.dtype))


def _cross_entropy_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden = args[0]
    saved = hidden.new_empty((hidden.shape[0], ops.saved_width(hidden, args[1].shape[0])), dtype=torch.float64)
    scale = hidden.new_empty((), dtype=torch.float64)
    return _fake_loss(hidden, args[12]), saved, scale, *_fake_gradients(*args[:3], *args[14:])


def _sampled_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, tokens = args[0], args[1], args[0].shape[0]
    of_tokens, of_entries = [tokens], [tokens]
    if hidden.is_cuda:
        plain = args[4].dtype not in CODES and args[8] == 0.0
        of_entries.append(slots_of_token(args[14], weight.shape[0], plain))
    else:
        of_tokens, of_entries = [tokens + 1], [torch.library.get_ctx().new_dynamic_size()]
    return (
        _fake_loss(hidden, args[12]),
        hidden.new_empty((), dtype=torch.float64),
        hidden.new_empty(of_tokens, dtype=torch.int64),
        hidden.new_empty(of_entries, dtype=torch.int32),
        hidden.new_empty(of_entries, dtype=accumulation_dtype(hidden.dtype)),
    )


def _statistics_fake(hidden: Tensor, weight: Tensor, bias: Any, chunk: Any, target: Any, logit_bias: Any, *rest: Any) -> Any:
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    return ops.stats_outputs(logits, target, 1, rest[-1])


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear_cross_entropy": (_cross_entropy_op, _cross_entropy_fake),
    "linear_cross_entropy_backward": (_backward_op, lambda upstream, *args: _fake_gradients(*args[:3], *args[-3:])),
    "linear_soft_target_gradient": (_soft_target_op, lambda upstream, *args: torch.empty_like(args[4])),
    "linear_cross_entropy_sampled": (_sampled_op, _sampled_fake),
    "linear_sampled_backward": (_sampled_backward_op, lambda upstream, *args: _fake_gradients(*args[:3], *args[-3:])),
    "linear_statistics": (_statistics_op, _statistics_fake),
    "linear_gradient": (_gradient_op, lambda *args: _fake_gradients(*args[:3], *args[-3:])),
}
for _name, (_function, _fake) in OPERATORS.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"fastloss::{_name}", _fake)
