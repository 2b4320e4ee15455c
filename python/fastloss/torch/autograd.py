# SPDX-License-Identifier: Apache-2.0
"""Autograd: what is kept for backward, and which kernel makes which gradient.

`CrossEntropy` is for eager mode, where a small loss takes less time than the dispatcher. Everywhere else the operators are
called, which have derivatives of their own: those of a loss are operators too, and theirs are the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction

from fastloss._options import NONE, row_shape
from fastloss.torch import (
    batching,  # noqa: F401  its import registers the rules for vmap
    ops,
    plain,
)
from fastloss.torch.ahead import ExpectationOfGpu, OnGpu, expectation, expectation_of
from fastloss.torch.operators import DIFFERENTIABLE, LIBRARY, as_tensor
from fastloss.torch.ops import CODES, Options

LOGITS, TARGET, WEIGHT, BIAS = range(4)


class CrossEntropy(Function):
    """The loss in eager mode; keeps a few numbers a row."""

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
        may_be_ahead = reduction != NONE and not inplace and ctx.needs_input_grad[LOGITS]
        if may_be_ahead and (expected := expectation_of(logits)):
            ctx.ahead = expected.start(logits)
        made = () if ctx.ahead is None else (ctx.ahead.grad, ctx.ahead.upstream)
        loss, saved, ctx.scale = ops.cross_entropy(
            logits, target, weight, bias, options, reduction, denominator, True, *made, as_with_gradient=may_be_ahead
        )
        ctx.save_for_backward(logits, target, weight, bias, saved)
        ctx.options = options
        ctx.inplace = inplace
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Runs the gradient pass, if that is still to be done."""
        logits, target, weight, bias, saved = ctx.saved_tensors
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        differentiated = torch.is_grad_enabled()
        if differentiated and ctx.inplace:
            raise RuntimeError("inplace overwrites the logits, so the gradient cannot be differentiated (create_graph=True)")
        if differentiated or ops.is_batched_by_autograd(upstream) or ops.forward_mode():
            tensors = (logits, target, weight, bias, saved, as_tensor(ctx.scale))
            return *_gradients(upstream, tensors, ctx.options, ctx.needs_input_grad), *[None] * 4
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
    expected = expectation_of(logits) if upstream.ndim == 0 else None
    if expected is None:
        return None, False, None
    place = None if ahead is None else ahead.take()
    if isinstance(expected, ExpectationOfGpu):
        return place, False, expected.of_backward(ahead)
    brought = upstream.item()
    expected.learn(brought)
    return place, ahead is not None and brought == ahead.upstream, None


class CrossEntropyOverLogits(Function):
    """The loss, and its gradient over the logits in the same trip; nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Makes the gradient for the upstream gradient that can be expected. Takes the first arguments of `CrossEntropy`."""
        logits, target, weight, bias, options, reduction, denominator = arguments
        ctx.upstream = expectation.moderate_upstream if logits.is_cpu else 1.0
        of_rows = (logits, target, weight, bias, options)
        loss = ops.cross_entropy(*of_rows, reduction, denominator, False, logits.detach(), ctx.upstream)[0]
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Multiplies in place where another upstream gradient came than was expected."""
        if torch.is_grad_enabled() or ops.is_batched_by_autograd(upstream) or ops.forward_mode():
            raise RuntimeError("inplace=True leaves no logits: its gradient cannot be differentiated (create_graph=True)")
        (logits,) = ctx.saved_tensors
        torch.autograd.graph.increment_version(logits)
        grad = logits.detach()
        if grad.is_cpu:
            brought = upstream.item()
            expectation.learn(brought)
            if brought != ctx.upstream:
                grad.mul_(brought / ctx.upstream)
        else:
            ops.gpu().scale(grad, upstream)
        return grad, *[None] * 6


# `Function.apply` without its question whether `torch.func` is at work, where the caller has asked that already.
apply_cross_entropy = getattr(super(Function, CrossEntropy), "apply", CrossEntropy.apply)


# ---- derivatives of operators ----------------------------------------------------------------------------------------


def give_derivative(
    name: str, keep: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Sequence[Tensor | None]]
) -> None:
    """Registers a derivative: `keep(ctx, inputs, output)`, and gradients by the first inputs, None for the rest.

    It holds at each level of `torch.func`, compiled or not, where `torch.library.register_autograd` raises.
    """
    operator = getattr(torch.ops.fastloss, name).default
    count = len(operator._schema.arguments)
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def forward(ctx: Any, *inputs: Any) -> Any:
        # `apply` has switched gradients off, and switches them on again: of torch.func the next level wants them.
        torch._C._set_grad_enabled(ops.functorch_active())
        with below_autograd():
            output = operator(*inputs)
        keep(ctx, inputs, output)
        return output

    def padded_backward(ctx: Any, *upstreams: Any) -> Any:
        grads = () if upstreams[0] is None else backward(ctx, *upstreams)
        return *grads, *[None] * (count - len(grads))

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name} has no derivative in forward mode: take that of the loss, not of a backward")

    methods = {"forward": forward, "backward": padded_backward, "jvp": jvp}
    function: Any = type(f"fastloss_{name}_", (_SingleLevelFunction,), {n: staticmethod(f) for n, f in methods.items()})
    apply = function.apply

    def differentiable(*inputs: Any) -> Any:
        if ops.forward_mode() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            if not ops.functorch_active():
                return apply(*inputs)
            with enable_single_level_autograd_function():
                return apply(*inputs)
        with below_autograd():
            return operator(*inputs)

    LIBRARY.impl(name, differentiable, "Autograd")


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = Options(*inputs[4:10])


def _loss_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Sequence[Tensor | None]:
    return _gradients(upstream, ctx.saved_tensors, ctx.options, ctx.needs_input_grad)


def _gradients(upstream: Tensor, tensors: Sequence[Any], options: Options, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """By logits, target and class weights, as functions that can be differentiated again."""
    by_logits = by_target = by_weight = None
    if needs[LOGITS]:
        by_logits = torch.ops.fastloss.cross_entropy_backward(upstream, *tensors, *options)
    if needs[TARGET]:
        by_target = torch.ops.fastloss.soft_target_gradient(upstream, *tensors, *options)
    if needs[WEIGHT]:
        by_weight = _weight_gradient(upstream, tensors, options)
    if needs[BIAS]:
        raise ValueError("logit_bias gets no gradient from this loss: pass logit_bias.detach()")
    return by_logits, by_target, by_weight, None


def _weight_gradient(upstream: Tensor, tensors: Sequence[Any], options: Options) -> Tensor:
    """The plain formula: correct, and slower."""
    logits, target, weight, bias, _, scale = tensors
    if target.dtype not in CODES:
        raise ValueError("weight gets no gradient from this loss of class ids: pass weight.detach()")
    losses = plain.scaled_losses((logits, target, weight), (WEIGHT,), bias, scale, options)
    of_rows = upstream.expand(row_shape(logits.shape, options.dim))
    grad: Tensor = torch.func.vjp(losses, weight)[1](of_rows)[0]
    return grad


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    upstream, logits, target, weight, bias, _, scale, *options = inputs
    ctx.save_for_backward(upstream, logits, target, weight, bias, scale)
    ctx.options = Options(*options)


def _gradient_backward(by: int) -> Callable[..., Sequence[Tensor | None]]:
    def backward(ctx: Any, cotangent: Tensor) -> Sequence[Tensor | None]:
        """The plain formula: correct, and slower."""
        upstream, *tensors, bias, scale = ctx.saved_tensors
        logits, options = tensors[LOGITS], ctx.options
        places = tuple(place for place in (LOGITS, TARGET, WEIGHT) if place == by or ctx.needs_input_grad[1 + place])
        losses = plain.scaled_losses(tensors, places, bias, scale, options)
        variables = tuple(tensors[place] for place in places)
        cotangents = tuple(cotangent if place == by else None for place in places)
        of_rows = upstream.expand(row_shape(logits.shape, options.dim))
        by_rows, by_variables = plain.vjp_of_vjp(losses, variables, of_rows, cotangents)
        grads: list[Tensor | None] = [None] * 3
        for place, grad in zip(places, by_variables, strict=True):
            grads[place] = grad
        return by_rows.sum() if upstream.ndim == 0 else by_rows, *grads

    return backward


give_derivative("cross_entropy", _keep_loss, _loss_backward)
give_derivative("cross_entropy_backward", _keep_gradient, _gradient_backward(LOGITS))
give_derivative("soft_target_gradient", _keep_gradient, _gradient_backward(TARGET))


# ---- of statistics ---------------------------------------------------------------------------------------------------


def kept_statistics(ctx: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that backward needs; the integer ones have no derivative."""
    _, _, entropy, _, sum_sq_prob, max_prob, argmax, rank, saved = outputs
    ctx.mark_non_differentiable(argmax, rank, saved)
    return saved, entropy, sum_sq_prob, max_prob, argmax


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *kept_statistics(ctx, output))
    ctx.constants = inputs[3:]


def _statistics_backward(ctx: Any, *upstreams: Tensor) -> Sequence[Tensor | None]:
    of_statistics = upstreams[: len(DIFFERENTIABLE)]
    return (torch.ops.fastloss.statistics_backward(*of_statistics, *ctx.saved_tensors, *ctx.constants),)


def _keep_statistics_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.constants = inputs[14:]


def _statistics_gradient_backward(ctx: Any, cotangent: Tensor) -> Sequence[Tensor | None]:
    """The plain formula: correct, and slower."""
    *upstreams, logits, target, bias = ctx.saved_tensors
    want = ctx.constants[-1]

    def statistics(logits: Tensor) -> tuple[Tensor, ...]:
        return plain.statistics(logits, target, bias, *ctx.constants)

    by_upstreams, (by_logits,) = gradients_of_statistics(statistics, (logits,), upstreams, want, (cotangent,))
    return *by_upstreams, by_logits


def gradients_of_statistics(
    statistics: Callable[..., tuple[Tensor, ...]],
    variables: tuple[Tensor, ...],
    upstreams: Sequence[Tensor],
    want: Sequence[bool],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Gradients, by all upstream gradients and by the variables, of the gradient of the wanted statistics."""
    wanted = tuple(upstream for upstream, w in zip(upstreams, want, strict=False) if w)
    by_wanted, by_variables = plain.vjp_of_vjp(statistics, variables, wanted, cotangents)
    found = iter(by_wanted)
    return [next(found) if w else None for w in want[: len(DIFFERENTIABLE)]], by_variables


give_derivative("statistics", _keep_statistics, _statistics_backward)
give_derivative("statistics_backward", _keep_statistics_gradient, _statistics_gradient_backward)
