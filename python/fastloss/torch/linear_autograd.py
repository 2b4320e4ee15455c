# SPDX-License-Identifier: Apache-2.0
"""Autograd of linear cross-entropy and statistics: when gradients are made, and what is kept until then.

A reduced loss makes its gradients in forward, from the logits that it has at hand, and keeps them for backward: three products
in all. Backward scales them by the upstream gradient. Of 16 bits that would round twice, and bring nothing back of what float16
was too small for: there the CPU makes them for the upstream gradient that `ahead` expects, and again where another one comes.
The operators, which expect nothing, make those of bfloat16 for 1, which a power of two scales without rounding, and again for
what is no power of two; those of float16 in backward.

Losses of single tokens, and a second backward through the same graph, make the logits again. The sampled form keeps the sampled
entries, which are few, and sums them up in backward. Second derivatives are those of the plain formula: of sampled gradients
too, which are an estimate of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._options import NONE
from fastloss.torch import linear_ops, ops, plain
from fastloss.torch.ahead import expectation, saved_tensor_hooks
from fastloss.torch.autograd import give_derivative, gradients_of_statistics, kept_statistics
from fastloss.torch.linear_operators import grouped
from fastloss.torch.linear_ops import Head
from fastloss.torch.operators import as_tensor
from fastloss.torch.projection import NOTHING, Wanted

# Every function here starts with the arguments of linear_ops.Head and Task, the options of Task spread out.
_INPUTS = 12
_HIDDEN, _WEIGHT, _BIAS, _TARGET = 0, 1, 2, 4
_CLASS_WEIGHT, _LOGIT_BIAS = 5, 6


def _wanted(needs: Sequence[bool]) -> Wanted:
    return Wanted(needs[_HIDDEN], needs[_WEIGHT], needs[_BIAS])


def _made_for(hidden: Tensor, reduction: int) -> float | None:
    """The upstream gradient that forward makes gradients for in eager mode, None: it makes none."""
    if reduction == NONE or saved_tensor_hooks(True) is not None:
        return None
    if hidden.is_cpu and hidden.element_size() == 2:
        return expectation.upstream if expectation.steady else None
    return None if hidden.dtype == torch.float16 else 1.0


def wanted_of_operator(hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: int) -> Wanted:
    """Which gradients the operator makes along with the loss; others it makes in backward."""
    if reduction == NONE or hidden.dtype == torch.float16 or ops.is_traced() or not torch.is_grad_enabled():
        return NOTHING
    # What torch.func will ask for, a batched tensor does not tell.
    transformed = ops.functorch_active()
    return Wanted(*(factor is not None and (factor.requires_grad or transformed) for factor in (hidden, weight, bias)))


def _save(ctx: Any, inputs: Sequence[Any], *tensors: Tensor | None) -> None:
    ctx.constants = [None if isinstance(a, Tensor) else a for a in inputs]
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs), *tensors)


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    tensors = ctx.saved_tensors
    inputs = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=False)]
    return inputs, list(tensors[len(inputs) :])


def _at_their_places(length: int, by_factors: Sequence[Any], wanted: Wanted, by_target: Tensor | None = None) -> list[Any]:
    """Gradients at the places of the arguments."""
    grads: list[Any] = [None] * length
    for place, grad, want in zip((_HIDDEN, _WEIGHT, _BIAS), by_factors, wanted, strict=True):
        grads[place] = grad if want else None
    grads[_TARGET] = by_target
    return grads


class LinearCrossEntropy(Function):
    """In eager mode; after the inputs: reduction, denominator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The loss; of a reduced one the gradients too."""
        head, task, reduction, denominator = grouped(arguments)
        ctx.made_for = _made_for(head.hidden, reduction)
        at_once = NOTHING if ctx.made_for is None else _wanted(ctx.needs_input_grad)
        (loss, saved, ctx.scale), gradients = linear_ops.cross_entropy(
            head, task, reduction, denominator, at_once, ctx.made_for or 1.0
        )
        ctx.gradients = gradients if any(at_once) else None
        _save(ctx, arguments, saved)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Hands out the gradients, times the upstream gradient."""
        arguments, (saved,) = _saved(ctx)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or ops.is_batched_by_autograd(upstream) or ops.forward_mode():
            return *_gradients(upstream, arguments[:_INPUTS], as_tensor(ctx.scale), saved, needs), None, None
        wanted, (head, task, *_) = _wanted(needs), grouped(arguments)
        by_target = None
        if needs[_TARGET]:
            by_target = linear_ops.soft_target_gradient(upstream, head, task, saved, ctx.scale)
        gradients, ctx.gradients = ctx.gradients, None  # who gets them may change them: they are given away once
        as_expected = False
        if upstream.ndim == 0 and head.hidden.is_cpu:
            brought = upstream.item()
            expectation.learn(brought)
            as_expected = brought == ctx.made_for
        if gradients is not None and not as_expected:
            if head.hidden.is_cpu and head.hidden.element_size() == 2:
                gradients = None
            else:
                linear_ops.scale_gradients(gradients, upstream)
        if gradients is None and any(wanted):
            gradients = linear_ops.cross_entropy_backward(upstream.contiguous(), head, task, saved, ctx.scale, wanted)
        return tuple(_at_their_places(len(arguments), gradients or [None] * 3, wanted, by_target))


class LinearCrossEntropySparse(Function):
    """Sampled, with row-sparse gradients by weight and bias: for eager autograd, once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The exact loss, and a sample of its gradient by the logits."""
        head, task, reduction, denominator, threshold, seed = grouped(arguments)
        loss, entries = linear_ops.cross_entropy_sampled(head, task, reduction, denominator, threshold, seed)
        ctx.scale = loss.scale
        _save(ctx, arguments[:4], *entries)
        return loss.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Sums over the sampled entries."""
        if torch.is_grad_enabled() or ops.is_batched_by_autograd(upstream):
            raise NotImplementedError("sparse=True has neither second derivatives nor batched ones: pass sparse=False")
        inputs, entries = _saved(ctx)
        wanted = _wanted(ctx.needs_input_grad)
        gradients = linear_ops.sparse_backward(upstream, Head(*inputs), entries, ctx.scale, wanted)
        return tuple(_at_their_places(_INPUTS + 4, gradients, wanted))


# ---- derivatives of the operators ------------------------------------------------------------------------------------


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, saved, scale, *made = output
    ctx.mark_non_differentiable(saved, scale, *made)
    ctx.set_materialize_grads(False)  # those that forward has made are large
    ctx.made = Wanted(*inputs[-3:])
    _save(ctx, inputs[:_INPUTS], saved, scale, *(made if any(ctx.made) else ()))


def _loss_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Sequence[Tensor | None]:
    inputs, (saved, scale, *made) = _saved(ctx)
    needs = ctx.needs_input_grad
    complete = all(was_made or not want for was_made, want in zip(ctx.made, _wanted(needs), strict=True))
    return _gradients(upstream, inputs, scale, saved, needs, made if complete and made else (None,) * 3)


def _gradients(
    upstream: Tensor,
    inputs: Sequence[Any],
    scale: Tensor,
    saved: Tensor,
    needs: Sequence[bool],
    made: Sequence[Tensor | None] = (None,) * 3,
) -> list[Any]:
    """Those of the exact loss, as functions that can be differentiated again."""
    _check_constants(needs)
    wanted = _wanted(needs)
    grads: Sequence[Any] = [None] * 3
    if any(wanted):
        grads = torch.ops.fastloss.linear_cross_entropy_backward(upstream, *inputs, scale, *wanted, saved, *made)
    by_target = None
    if needs[_TARGET]:
        by_target = torch.ops.fastloss.linear_soft_target_gradient(upstream, *inputs, scale, saved)
    return _at_their_places(_INPUTS, grads, wanted, by_target)


def _check_constants(needs: Sequence[bool]) -> None:
    for place, name in ((_CLASS_WEIGHT, "weight"), (_LOGIT_BIAS, "logit_bias")):
        if needs[place]:
            raise ValueError(f"{name} gets no gradient from this loss: pass {name}.detach()")


def _keep_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs[:_INPUTS], *output[1:])


def _sampled_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Sequence[Tensor | None]:
    inputs, (scale, *entries) = _saved(ctx)
    needs = ctx.needs_input_grad
    _check_constants(needs)
    if needs[_TARGET]:
        raise ValueError("target gets no gradient from backward='sampled': pass target.detach()")
    wanted = _wanted(needs)
    grads = torch.ops.fastloss.linear_sampled_backward(upstream, *inputs, scale, *wanted, *entries)
    return _at_their_places(_INPUTS, grads, wanted)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    upstream, scale = inputs[0], inputs[1 + _INPUTS]
    ctx.wanted = inputs[2 + _INPUTS : 5 + _INPUTS]
    _save(ctx, inputs[1 : 1 + _INPUTS], upstream, scale)


def _gradient_backward(ctx: Any, *cotangents: Tensor) -> Sequence[Tensor | None]:
    triples = zip((_HIDDEN, _WEIGHT, _BIAS), cotangents, ctx.wanted, strict=True)
    return _second_derivatives(ctx, {place: cotangent for place, cotangent, want in triples if want})


def _target_gradient_backward(ctx: Any, cotangent: Tensor) -> Sequence[Tensor | None]:
    return _second_derivatives(ctx, {_TARGET: cotangent})


def _second_derivatives(ctx: Any, cotangents: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """The plain formula, with all logits at once: correct, and slower."""
    inputs, (upstream, scale) = _saved(ctx)
    (hidden, *_), task = grouped(inputs)
    places = [place for place in (_HIDDEN, _WEIGHT, _BIAS) if inputs[place] is not None]
    if task.target.dtype in ops.CODES:
        places.append(_TARGET)

    def losses(*variables: Tensor) -> Tensor:
        at = dict(zip(places, variables, strict=True))
        logits = plain.linear(at[_HIDDEN], at[_WEIGHT], at.get(_BIAS), task.target, task.options.ignore_index)
        rows = plain.row_losses(logits, at.get(_TARGET, task.target), task.class_weight, task.logit_bias, task.options)
        scaled: Tensor = rows * scale.to(rows.dtype)
        return scaled

    variables = tuple(inputs[place] for place in places)
    of_places = tuple(cotangents.get(place) for place in places)
    by_rows, by_variables = plain.vjp_of_vjp(losses, variables, upstream.expand(hidden.shape[0]), of_places)
    grads: list[Any] = [None] * _INPUTS
    for place, grad in zip(places, by_variables, strict=True):
        grads[place] = grad
    return by_rows.sum() if upstream.ndim == 0 else by_rows, *grads


give_derivative("linear_cross_entropy", _keep_loss, _loss_backward)
give_derivative("linear_cross_entropy_sampled", _keep_sample, _sampled_backward)
give_derivative("linear_cross_entropy_backward", _keep_gradient, _gradient_backward)
give_derivative("linear_sampled_backward", _keep_gradient, _gradient_backward)
give_derivative("linear_soft_target_gradient", _keep_gradient, _target_gradient_backward)


# ---- of statistics ---------------------------------------------------------------------------------------------------


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, *kept_statistics(ctx, output))


def _statistics_backward(ctx: Any, *upstreams: Tensor) -> Sequence[Tensor | None]:
    (*factors, target, logit_bias, softcap, temperature, want), of_rows = _saved(ctx)
    wanted = _wanted(ctx.needs_input_grad)
    rest = (target, logit_bias, *of_rows, softcap, temperature, want, *wanted)
    grads = torch.ops.fastloss.linear_statistics_backward(*upstreams[:6], *factors, *rest)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


def _keep_statistics_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, (*inputs[:12], *inputs[17:]))


def _statistics_gradient_backward(ctx: Any, *cotangents: Tensor) -> Sequence[Tensor | None]:
    """The plain formula, with all logits at once."""
    inputs, _ = _saved(ctx)
    upstreams, (hidden, weight, bias, _, target, logit_bias) = inputs[:6], inputs[6:12]
    softcap, temperature, want, *wanted = inputs[12:]
    factors = (hidden, weight) if bias is None else (hidden, weight, bias)

    def statistics(*factors: Tensor) -> tuple[Tensor, ...]:
        return plain.statistics(torch.nn.functional.linear(*factors), target, logit_bias, 1, softcap, temperature, want)

    of_wanted = tuple(c if w else None for c, w in zip(cotangents, wanted, strict=True))[: len(factors)]
    by_upstreams, by_factors = gradients_of_statistics(statistics, factors, upstreams, want, of_wanted)
    return *by_upstreams, *by_factors


give_derivative("linear_statistics", _keep_statistics, _statistics_backward)
give_derivative("linear_statistics_backward", _keep_statistics_gradient, _statistics_gradient_backward)
