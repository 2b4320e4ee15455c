# SPDX-License-Identifier: Apache-2.0
"""Autograd of linear cross-entropy and statistics: when gradients are made, and what is kept until then.

A reduced loss makes its gradients in forward, from the logits that it has at hand, and keeps them for backward: three products
in all. Losses of single tokens, and a second backward through the same graph, make the logits again. The sampled form keeps
the sampled entries, which are few, and sums them up in backward. Second derivatives are those of the plain formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._options import NONE
from fastloss.torch import linear_ops, ops, plain
from fastloss.torch.autograd import statistics_coefficients
from fastloss.torch.linear_ops import SparseGradient, grouped
from fastloss.torch.projection import NOTHING, Wanted

_HIDDEN, _WEIGHT, _BIAS, _TARGET = 0, 1, 2, 4


def _wanted(needs: tuple[bool, ...]) -> Wanted:
    return Wanted(needs[_HIDDEN], needs[_WEIGHT], needs[_BIAS])


def _returned(by_factors: Any, wanted: Wanted, length: int, by_target: Tensor | None = None) -> tuple[Any, ...]:
    """Gradients at the places of the arguments."""
    grads: list[Any] = [None] * length
    for i, (grad, want) in enumerate(zip(by_factors, wanted, strict=True)):
        grads[i] = grad if want else None
    grads[_TARGET] = by_target
    return tuple(grads)


class LinearCrossEntropy(Function):
    """Arguments: those of Head, those of Task with its options spread out, reduction, denominator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The loss; of a reduced one the gradients too."""
        head, task, reduction, denominator = grouped(arguments)
        at_once = _wanted(ctx.needs_input_grad) if reduction != NONE else NOTHING
        (loss, saved, ctx.scale), gradients = linear_ops.cross_entropy(head, task, reduction, denominator, at_once)
        ctx.gradients = gradients if any(at_once) else None
        tensors = [a if isinstance(a, Tensor) else None for a in arguments]
        ctx.save_for_backward(*tensors, saved)
        ctx.constants = [None if isinstance(a, Tensor) else a for a in arguments]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Hands out the gradients, times the upstream gradient."""
        *tensors, saved = ctx.saved_tensors
        arguments = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        wanted = _wanted(ctx.needs_input_grad)
        scale = torch.tensor(ctx.scale, dtype=torch.float64)
        by_target = None
        if torch.is_grad_enabled() or ops.is_batched_by_autograd(upstream):
            return _differentiable_gradients(upstream, arguments[:12], saved, scale, None, ctx.needs_input_grad)
        head, task, *_ = grouped(arguments)
        if ctx.needs_input_grad[_TARGET]:
            by_target = linear_ops.soft_target_gradient(upstream, head, task, saved, ctx.scale)
        gradients, ctx.gradients = ctx.gradients, None  # the caller may keep and change them: they are given away once
        if gradients is None and any(wanted):
            gradients = linear_ops.cross_entropy_backward(upstream.contiguous(), head, task, saved, ctx.scale, wanted)
        elif gradients is not None and upstream.item() != 1.0:
            for grad in gradients:
                grad.mul_(upstream)
        return _returned(gradients or [None] * 3, wanted, len(arguments), by_target)


class LinearCrossEntropyUnderTransforms(Function):
    """The same for `torch.func` and `torch.compile`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wanted: Wanted, *arguments: Any) -> tuple[Tensor, ...]:
        """The loss; of a reduced one the gradients too."""
        at_once = wanted if arguments[12] != NONE else NOTHING
        out: tuple[Tensor, ...] = torch.ops.fastloss.linear_cross_entropy(*arguments, *at_once)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs, and the gradients of a reduced loss."""
        wanted, *arguments = inputs
        _, saved, scale, *gradients = output
        ctx.mark_non_differentiable(*output[1:])
        tensors = [a if isinstance(a, Tensor) else None for a in arguments[:12]]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in arguments[:12]]
        ctx.at_once = arguments[12] != NONE
        ctx.wanted = wanted
        ctx.save_for_backward(*tensors, saved, scale, *gradients)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        """Hands out the gradients, times the upstream gradient."""
        *tensors, saved, scale, by_hidden, by_weight, by_bias = ctx.saved_tensors
        arguments = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        made = (by_hidden, by_weight, by_bias) if ctx.at_once else None
        needs = ctx.needs_input_grad[1:]
        return None, *_differentiable_gradients(upstream, arguments, saved, scale, made, needs)


def _differentiable_gradients(
    upstream: Tensor, arguments: list[Any], saved: Tensor, scale: Tensor, made: Any, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    wanted = _wanted(needs)
    grads: Any = [None] * 3
    if any(wanted):
        grads = LinearGradient.apply(wanted, upstream, *arguments, saved, scale, *(made or [None] * 3))
    by_target = None
    if needs[_TARGET]:
        by_target = torch.ops.fastloss.linear_soft_target_gradient(upstream, *arguments, saved, scale)
    return _returned(grads, wanted, len(needs), by_target)


class LinearGradient(Function):
    """The gradients as functions that can be differentiated again: forward scales or makes them, backward is plain."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wanted: Wanted, upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Made gradients times upstream, or the kernels."""
        *inputs, saved, scale, by_hidden, by_weight, by_bias = arguments
        made = (by_hidden, by_weight, by_bias)
        if any(grad is not None for grad in made):
            return tuple(grad * upstream.to(grad.dtype) for grad in made)
        out = torch.ops.fastloss.linear_cross_entropy_backward(upstream, *inputs, saved, scale, *wanted)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        ctx.wanted, upstream, *arguments = inputs
        ctx.count = len(inputs)
        scale = arguments[13]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in arguments[:12]]
        ctx.save_for_backward(upstream, scale, *(a if isinstance(a, Tensor) else None for a in arguments[:12]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The plain formula, with all logits at once: correct, and slower."""
        upstream, scale, *tensors = ctx.saved_tensors
        arguments = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        by_upstream, by_factors = _second_derivative(upstream, scale, arguments, ctx.wanted, cotangents)
        return None, by_upstream, *by_factors, *[None] * (ctx.count - 2 - len(by_factors))


def _second_derivative(
    upstream: Tensor, scale: Tensor, arguments: list[Any], wanted: Wanted, cotangents: tuple[Tensor, ...]
) -> tuple[Tensor, list[Any]]:
    (hidden, weight, bias, _), task = grouped(arguments)
    factors = (hidden, weight) if bias is None else (hidden, weight, bias)

    def losses(*factors: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(*factors)
        rows = plain.row_losses(logits, task.target, task.class_weight, task.logit_bias, task.options)
        scaled: Tensor = rows * scale.to(rows.dtype)
        return scaled

    wanted_cotangents = tuple(c if w else None for c, w in zip(cotangents, wanted, strict=True))[: len(factors)]
    by_rows, by_factors = plain.vjp_of_vjp(losses, factors, upstream.expand(hidden.shape[0]), wanted_cotangents)
    by_upstream = by_rows.sum() if upstream.ndim == 0 else by_rows
    return by_upstream, [*by_factors, *[None] * (3 - len(by_factors))]


class LinearCrossEntropySampled(Function):
    """Arguments: as for LinearCrossEntropy, then threshold and seed."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The exact loss, and a sample of its gradient by the logits."""
        out: tuple[Tensor, ...] = torch.ops.fastloss.linear_cross_entropy_sampled(*arguments)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs and the sampled entries."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.constants = [None if isinstance(a, Tensor) else a for a in inputs[:12]]
        ctx.count = len(inputs)
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs[:12]), *output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        """Sums over the sampled entries."""
        *tensors, scale, start, columns, values = ctx.saved_tensors
        arguments = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        wanted = _wanted(ctx.needs_input_grad)
        grads = SampledGradient.apply(wanted, upstream, *arguments, scale, start, columns, values)
        return _returned(grads, wanted, ctx.count)


class SampledGradient(Function):
    """The gradients from sampled entries; differentiated again, they are those of the exact loss, which they estimate."""

    @staticmethod
    def forward(wanted: Wanted, upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Sums over the sampled entries."""
        *inputs, scale, start, columns, values = arguments
        entries = SparseGradient(start, columns, values)
        out = torch.ops.fastloss.linear_sampled_backward(upstream, *inputs[:4], *entries, scale, *wanted)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        ctx.wanted, upstream, *arguments = inputs
        ctx.constants = [None if isinstance(a, Tensor) else a for a in arguments[:12]]
        ctx.save_for_backward(upstream, arguments[12], *(a if isinstance(a, Tensor) else None for a in arguments[:12]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The plain formula, with all logits at once."""
        upstream, scale, *tensors = ctx.saved_tensors
        arguments = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
        by_upstream, by_factors = _second_derivative(upstream, scale, arguments, ctx.wanted, cotangents)
        return None, by_upstream, *by_factors, *[None] * 13


class LinearStatistics(Function):
    """Arguments: those of Head, target, logit bias, softcap, temperature, what is wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The eight statistics, empty where not wanted, and `saved`."""
        return tuple(torch.ops.fastloss.linear_statistics(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the factors and numbers of tokens."""
        hidden, weight, bias, ctx.chunk_tokens, target, logit_bias, *ctx.constants = inputs
        _, _, entropy, _, sum_sq_prob, max_prob, argmax, rank, saved = output
        ctx.mark_non_differentiable(argmax, rank, saved)
        kept = (saved, entropy, sum_sq_prob, max_prob, argmax)
        ctx.save_for_backward(hidden, weight, bias, target, logit_bias, *kept)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        """The gradients, from logits that are made again."""
        wanted = _wanted(ctx.needs_input_grad)
        constants = (wanted, ctx.chunk_tokens, *ctx.constants)
        grads = LinearStatisticsGradient.apply(constants, *ctx.saved_tensors, *upstreams[:6])
        return _returned(grads, wanted, 4 + 2 + 3)


class LinearStatisticsGradient(Function):
    """The gradients of the statistics, which can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(constants: Any, *tensors: Any) -> tuple[Tensor, ...]:
        """Coefficients of each token, then one kernel and the products."""
        wanted, chunk_tokens, softcap, temperature, want = constants
        hidden, weight, bias, target, logit_bias, saved, *rest = tensors
        entropy, sum_sq_prob, max_prob, argmax, *upstreams = rest
        coefficients, ids, factors = statistics_coefficients(
            target, weight.shape[0], saved, entropy, sum_sq_prob, max_prob, argmax, want, tuple(upstreams)
        )
        out = torch.ops.fastloss.linear_gradient(
            hidden, weight, bias, chunk_tokens, saved, coefficients, ids, factors, logit_bias, softcap, temperature, *wanted
        )
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        ctx.constants, hidden, weight, bias, target, logit_bias, *rest = inputs
        ctx.save_for_backward(hidden, weight, bias, target, logit_bias, *rest[5:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The plain formula, with all logits at once."""
        wanted, _, softcap, temperature, want = ctx.constants
        hidden, weight, bias, target, logit_bias, *upstreams = ctx.saved_tensors
        factors = (hidden, weight) if bias is None else (hidden, weight, bias)

        def stats(*factors: Tensor) -> tuple[Tensor, ...]:
            logits = torch.nn.functional.linear(*factors)
            return plain.statistics(logits, target, logit_bias, 1, softcap, temperature, list(want[:6]))

        of_wanted = tuple(u for u, w in zip(upstreams, want, strict=False) if w)
        wanted_cotangents = tuple(c if w else None for c, w in zip(cotangents, wanted, strict=True))[: len(factors)]
        by_wanted, by_factors = plain.vjp_of_vjp(stats, factors, of_wanted, wanted_cotangents)
        found = iter(by_wanted)
        by_upstreams = [next(found) if w else None for w in want[:6]]
        return None, *by_factors, *[None] * (3 - len(by_factors)), *[None] * 7, *by_upstreams
