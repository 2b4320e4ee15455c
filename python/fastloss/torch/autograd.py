# SPDX-License-Identifier: Apache-2.0
"""Autograd: what is kept for backward, and which kernel makes which gradient.

`CrossEntropy` is for eager mode and `torch.compile`; `CrossEntropyUnderTransforms` is the form that `torch.func` asks for,
which costs more on every call. Gradients that are themselves differentiated are made by a Function of their own: its forward
is the kernel, its backward the plain formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._options import NONE, row_shape
from fastloss.torch import (
    batching,  # noqa: F401  its import registers the rules for vmap
    ops,
    plain,
)
from fastloss.torch.ahead import ExpectationOfGpu, OnGpu, expectation_of
from fastloss.torch.ops import Options

LOGITS, TARGET = 0, 1


class CrossEntropy(Function):
    """The loss; keeps a few numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: Options,
        reduction: int,
        denominator: float | None,
        inplace: bool,
    ) -> Tensor:
        """Runs the statistics pass, and makes the gradient on the way if its upstream gradient can be expected."""
        ctx.ahead = None
        if not torch.compiler.is_compiling():
            may_be_ahead = reduction != NONE and not inplace and ctx.needs_input_grad[LOGITS]
            if may_be_ahead and (expectation := expectation_of(logits)):
                ctx.ahead = expectation.start(logits)
            made = () if ctx.ahead is None else (ctx.ahead.grad, ctx.ahead.upstream)
            loss, saved, scale = ops.cross_entropy(
                logits, target, weight, bias, options, reduction, denominator, True, *made, as_with_gradient=may_be_ahead
            )
            ctx.scale = scale
            ctx.save_for_backward(logits, target, weight, bias, saved)
        else:
            loss, saved, scale = torch.ops.fastloss.cross_entropy(
                logits, target, weight, bias, *options, reduction, denominator
            )
            ctx.scale = None
            ctx.save_for_backward(logits, target, weight, bias, saved, scale)
        ctx.options = options
        ctx.inplace = inplace
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Runs the gradient pass, if that is still to be done."""
        logits, target, weight, bias, saved, *scale = ctx.saved_tensors
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        if ctx.scale is None or ops.is_batched_by_autograd(upstream):
            factor = scale[0] if scale else ops.as_tensor(ctx.scale)
            tensors = (upstream, logits, target, weight, bias, saved, factor)
            by_logits = _gradient_op(LOGITS, tensors, ctx.options) if needs_logits else None
            by_target = _gradient_op(TARGET, tensors, ctx.options) if needs_target else None
            return by_logits, by_target, None, None, None, None, None, None
        if torch.is_grad_enabled():
            if ctx.inplace:
                raise RuntimeError(
                    "inplace=True overwrites the logits, so the gradient cannot be differentiated (create_graph=True)"
                )
            factor = ops.as_tensor(ctx.scale)
            tensors = (upstream, logits, target, weight, bias, saved, factor)
            return *_gradients(tensors, ctx.options, needs_logits, needs_target), None
        arguments = (upstream, logits, target, weight, bias, saved, ctx.scale, ctx.options)
        by_target = ops.soft_target_gradient(*arguments) if needs_target else None
        by_logits = None
        if needs_logits:
            by_logits, made, expected = _place_for_gradient(ctx, upstream, logits)
            if not made:
                by_logits = ops.cross_entropy_backward(*arguments, by_logits, expected)
        return by_logits, by_target, None, None, None, None, None, None


def _place_for_gradient(ctx: Any, upstream: Tensor, logits: Tensor) -> tuple[Tensor | None, bool, OnGpu | None]:
    """Where the gradient goes (None: to fresh memory); whether it is there already, or how the GPU finds that out."""
    ahead, ctx.ahead = ctx.ahead, None
    if ctx.inplace:
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), False, None
    expectation = expectation_of(logits) if upstream.ndim == 0 else None
    if expectation is None:
        return None, False, None
    place = None if ahead is None else ahead.take()
    if isinstance(expectation, ExpectationOfGpu):
        return place, False, expectation.of_backward(ahead)
    brought = upstream.item()
    expectation.learn(brought)
    return place, ahead is not None and brought == ahead.upstream, None


# `Function.apply` without its question whether `torch.func` is at work, where the caller has asked that already.
apply_cross_entropy = getattr(super(Function, CrossEntropy), "apply", CrossEntropy.apply)


class CrossEntropyUnderTransforms(Function):
    """The same for `torch.func`: `grad`, `vmap` and what is made of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: Options,
        reduction: int,
        denominator: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the statistics pass."""
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.fastloss.cross_entropy(
            logits, target, weight, bias, *options, reduction, denominator
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs and a few numbers a row."""
        _, saved, scale = output
        ctx.mark_non_differentiable(saved, scale)
        ctx.save_for_backward(*inputs[:4], saved, scale)
        ctx.options = inputs[4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        """Runs the gradient pass."""
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        return _gradients((upstream, *ctx.saved_tensors), ctx.options, needs_logits, needs_target)


def _gradient_op(by: int, tensors: tuple[Any, ...], options: Options) -> Tensor:
    op = torch.ops.fastloss.cross_entropy_backward if by == LOGITS else torch.ops.fastloss.soft_target_gradient
    grad: Tensor = op(*tensors, *options)
    return grad


def _gradients(tensors: tuple[Any, ...], options: Options, needs_logits: bool, needs_target: bool) -> tuple[Any, ...]:
    by_logits = CrossEntropyGradient.apply(*tensors, LOGITS, options) if needs_logits else None
    by_target = CrossEntropyGradient.apply(*tensors, TARGET, options) if needs_target else None
    return by_logits, by_target, None, None, None, None, None


class CrossEntropyGradient(Function):
    """The gradient by the logits or by soft targets, as a function that can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        scale: Tensor,
        by: int,
        options: Options,
    ) -> Tensor:
        """Runs the kernel."""
        return _gradient_op(by, (upstream, logits, target, weight, bias, saved, scale), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        upstream, logits, target, weight, bias, _, scale, ctx.by, ctx.options = inputs
        ctx.save_for_backward(upstream, logits, target, weight, bias, scale)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """The plain formula: correct, and slower."""
        upstream, logits, target, weight, bias, scale = ctx.saved_tensors
        options = ctx.options
        soft = target.dtype in ops.CODES

        def losses(logits: Tensor, *soft_target: Tensor) -> Tensor:
            rows = plain.row_losses(logits, soft_target[0] if soft else target, weight, bias, options)
            scaled: Tensor = rows * scale.to(rows.dtype)
            return scaled

        def upstream_of_rows(upstream: Tensor) -> Tensor:
            return upstream.expand(row_shape(logits.shape, options.dim))

        inputs = (logits, target) if soft else (logits,)
        cotangents = tuple(cotangent if i == ctx.by else None for i in range(len(inputs)))
        by_upstream, by_inputs = plain.vjp_of_vjp(losses, inputs, upstream_of_rows(upstream), cotangents)
        by_upstream = by_upstream.sum() if upstream.ndim == 0 else by_upstream
        by_target = by_inputs[1] if soft else None
        return by_upstream, by_inputs[0], by_target, None, None, None, None, None, None


class Statistics(Function):
    """The eight statistics, empty where not wanted, and `saved`; in eager mode and `torch.compile`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        dim: int,
        softcap: float,
        temperature: float,
        want: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        """Runs the statistics pass."""
        outputs = tuple(torch.ops.fastloss.statistics(logits, target, bias, dim, softcap, temperature, list(want)))
        _keep_statistics(ctx, (logits, target, bias), outputs)
        ctx.constants = (dim, softcap, temperature, want)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        """Runs the gradient pass."""
        arguments = (*ctx.saved_tensors, *ctx.constants, *upstreams[:6])
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            grad = _statistics_gradient(*arguments)
        else:
            grad = StatisticsGradient.apply(*arguments)
        return grad, None, None, None, None, None, None


class StatisticsUnderTransforms(Function):
    """The same for `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        dim: int,
        softcap: float,
        temperature: float,
        want: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        """Runs the statistics pass."""
        return tuple(torch.ops.fastloss.statistics(logits, target, bias, dim, softcap, temperature, list(want)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the logits and numbers of rows."""
        _keep_statistics(ctx, inputs[:3], output)
        ctx.constants = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        """Runs the gradient pass."""
        grad = StatisticsGradient.apply(*ctx.saved_tensors, *ctx.constants, *upstreams[:6])
        return grad, None, None, None, None, None, None


def _keep_statistics(ctx: Any, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, entropy, _, sum_sq_prob, max_prob, argmax, rank, saved = outputs
    ctx.mark_non_differentiable(argmax, rank, saved)
    ctx.save_for_backward(*inputs, saved, entropy, sum_sq_prob, max_prob, argmax)


def _statistics_gradient(
    logits: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    entropy: Tensor,
    sum_sq_prob: Tensor,
    max_prob: Tensor,
    argmax: Tensor,
    dim: int,
    softcap: float,
    temperature: float,
    want: tuple[bool, ...],
    *upstreams: Tensor,
) -> Tensor:
    """The coefficients, then the one gradient kernel."""
    coefficients, ids, factors = statistics_coefficients(
        target, logits.shape[dim], saved, entropy, sum_sq_prob, max_prob, argmax, want, upstreams
    )
    grad: Tensor = torch.ops.fastloss.gradient(logits, saved, coefficients, ids, factors, bias, dim, softcap, temperature)
    return grad


def statistics_coefficients(
    target: Tensor | None,
    classes: int,
    saved: Tensor,
    entropy: Tensor,
    sum_sq_prob: Tensor,
    max_prob: Tensor,
    argmax: Tensor,
    want: tuple[bool, ...],
    upstreams: tuple[Tensor, ...],
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


class StatisticsGradient(Function):
    """The gradient of the statistics by the logits, as a function that can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        """Runs the kernel."""
        grad: Tensor = _statistics_gradient(*arguments)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        logits, target, bias, *_ = inputs
        ctx.transform = inputs[8:11]
        ctx.want = inputs[11]
        ctx.save_for_backward(logits, target, bias, *inputs[12:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """The plain formula: correct, and slower."""
        logits, target, bias, *upstreams = ctx.saved_tensors
        dim, softcap, temperature = ctx.transform
        wanted = tuple(u for u, w in zip(upstreams, ctx.want, strict=False) if w)

        def stats(logits: Tensor) -> tuple[Tensor, ...]:
            return plain.statistics(logits, target, bias, dim, softcap, temperature, list(ctx.want[:6]))

        by_wanted, by_inputs = plain.vjp_of_vjp(stats, (logits,), wanted, (cotangent,))
        found = iter(by_wanted)
        by_upstreams = [next(found) if w else None for w in ctx.want[:6]]
        return by_inputs[0], *[None] * 11, *by_upstreams
