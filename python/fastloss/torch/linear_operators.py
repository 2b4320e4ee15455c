# SPDX-License-Identifier: Apache-2.0
"""The functions of `linear_ops` as operators of PyTorch: for tracing, `torch.compile`, `torch.func` and `vmap`.

All start with the arguments of `linear_ops.Head` and `Task`, the options of `Task` spread out; gradients with their upstream
gradient, and what comes after the task starts with the factor of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._options import NONE
from fastloss._sampled import slots_of_token
from fastloss.torch import linear_ops, ops
from fastloss.torch.linear_ops import Head, Task
from fastloss.torch.operators import (
    BY_STATISTICS,
    LIBRARY,
    NAMED_STATISTICS,
    SAVED_STATISTICS,
    as_tensor,
    statistics_coefficients,
)
from fastloss.torch.ops import CODES, Options, accumulation_dtype
from fastloss.torch.projection import Wanted

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, int? chunk_tokens"
_TASK = (
    "Tensor target, Tensor? class_weight, Tensor? logit_bias, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap, float temperature"
)
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"
_GRADIENTS = "(Tensor by_hidden, Tensor by_weight, Tensor by_bias)"
_STATISTICS = "Tensor? target, Tensor? logit_bias"
_TRANSFORM = "float softcap, float temperature, int[] want"
LIBRARY.define(
    f"linear_cross_entropy({_HEAD}, {_TASK}, int reduction, float? denominator, {_WANTED})"
    " -> (Tensor loss, Tensor saved, Tensor scale, Tensor by_hidden, Tensor by_weight, Tensor by_bias)"
)
LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor upstream, {_HEAD}, {_TASK}, Tensor scale, {_WANTED}, Tensor saved,"
    f" Tensor? made_hidden, Tensor? made_weight, Tensor? made_bias) -> {_GRADIENTS}"
)
LIBRARY.define(f"linear_soft_target_gradient(Tensor upstream, {_HEAD}, {_TASK}, Tensor scale, Tensor saved) -> Tensor")
LIBRARY.define(
    f"linear_cross_entropy_sampled({_HEAD}, {_TASK}, int reduction, float? denominator, float threshold, Tensor seed)"
    " -> (Tensor loss, Tensor scale, Tensor start, Tensor columns, Tensor values)"
)
LIBRARY.define(
    f"linear_sampled_backward(Tensor upstream, {_HEAD}, {_TASK}, Tensor scale, {_WANTED}, Tensor start, Tensor columns,"
    f" Tensor values) -> {_GRADIENTS}"
)
LIBRARY.define(f"linear_statistics({_HEAD}, {_STATISTICS}, {_TRANSFORM}) -> {NAMED_STATISTICS}")
LIBRARY.define(
    f"linear_statistics_backward({BY_STATISTICS}, {_HEAD}, {_STATISTICS}, {SAVED_STATISTICS}, {_TRANSFORM}, {_WANTED})"
    f" -> {_GRADIENTS}"
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
    return loss, saved, as_tensor(scale), *gradients


def _backward_op(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, task, scale, *wanted, saved, by_hidden, by_weight, by_bias = grouped(args)
    made = (by_hidden, by_weight, by_bias)
    if by_hidden is not None and linear_ops.scaled_is_rounded_once(head.hidden, upstream):
        return tuple((grad * upstream).to(grad.dtype) if w else grad.new_empty(0) for grad, w in zip(made, wanted, strict=True))
    gradients = linear_ops.cross_entropy_backward(upstream.contiguous(), head, task, saved, _factor(scale), Wanted(*wanted))
    return tuple(gradients)


def _soft_target_op(upstream: Tensor, *args: Any) -> Tensor:
    head, task, scale, saved = grouped(args)
    return linear_ops.soft_target_gradient(upstream, head, task, saved, _factor(scale))


def _sampled_op(*args: Any) -> tuple[Tensor, ...]:
    head, task, reduction, denominator, threshold, seed = grouped(args)
    loss, entries = linear_ops.cross_entropy_sampled(head, task, reduction, denominator, threshold, seed)
    return loss.loss, as_tensor(loss.scale), *entries


def _sampled_backward_op(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, _, scale, *rest = grouped(args)
    return tuple(linear_ops.sampled_backward(upstream, head, rest[3:], _factor(scale), Wanted(*rest[:3])))


def _statistics_op(*args: Any) -> tuple[Tensor, ...]:
    return tuple(linear_ops.statistics(Head(*args[:4]), *args[4:]))


def _statistics_backward_op(*args: Any) -> tuple[Tensor, ...]:
    upstreams, head, (target, logit_bias), of_rows = args[:6], Head(*args[6:10]), args[10:12], args[12:17]
    softcap, temperature, want, *wanted = args[17:]
    coefficients, ids, factors = statistics_coefficients(upstreams, want, target, head.weight.shape[0], *of_rows)
    terms = (of_rows[0], coefficients, ids, factors)
    return tuple(linear_ops.gradient(head, *terms, logit_bias, softcap, temperature, Wanted(*wanted)))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *wanted: bool) -> tuple[Tensor, ...]:
    like = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(like, wanted, strict=True))


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
    return tuple(ops.stats_outputs(logits, target, 1, rest[-1]))


def _gradients_fake(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(*args[:3], *args[13:16])


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear_cross_entropy": (_cross_entropy_op, _cross_entropy_fake),
    "linear_cross_entropy_backward": (_backward_op, _gradients_fake),
    "linear_soft_target_gradient": (_soft_target_op, lambda upstream, *args: torch.empty_like(args[4])),
    "linear_cross_entropy_sampled": (_sampled_op, _sampled_fake),
    "linear_sampled_backward": (_sampled_backward_op, _gradients_fake),
    "linear_statistics": (_statistics_op, _statistics_fake),
    "linear_statistics_backward": (_statistics_backward_op, lambda *args: _fake_gradients(*args[6:9], *args[-3:])),
}
for _name, (_function, _fake) in OPERATORS.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"fastloss::{_name}", _fake)
