# SPDX-License-Identifier: Apache-2.0
"""Autograd of linear cross-entropy and statistics: when gradients are made, and what is kept until then.

A reduced loss makes its gradients in forward, from the logits that it has at hand, and keeps them for backward: three products
in all. Backward scales them by the upstream gradient. Of 16 bits that would round twice, and bring nothing back of what float16
was too small for: there the CPU makes them for the upstream gradient that `ahead` expects, and again where another one comes.

Losses of single tokens, and a second backward through the same graph, make the logits again. The sampled form keeps the sampled
entries, which are few, and sums them up in backward. Second derivatives are those of the plain formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._options import NONE
from fastloss.torch import linear_ops, ops, plain
from fastloss.torch.ahead import expectation
from fastloss.torch.autograd import statistics_coefficients
from fastloss.torch.linear_operators import grouped
from fastloss.torch.linear_ops import Head
from fastloss.torch.projection import NOTHING, Wanted

# Every function here starts with the arguments of linear_ops.Head and Task, the options of Task spread out.
_INPUTS = 12
_HIDDEN, _WEIGHT, _BIAS, _TARGET = 0, 1, 2, 4


def _wanted(needs: Sequence[bool]) -> Wanted:
    return Wanted(needs[_HIDDEN], needs[_WEIGHT], needs[_BIAS])


def _made_for(hidden: Tensor, reduction: int, eager: bool) -> float | None:
    """The upstream gradient that forward makes gradients for, None: it makes none."""
    if reduction == NONE:
        return None
    if eager and hidden.is_cpu and hidden.element_size() == 2:
        return expectation.upstream if expectation.steady else None
    return None if hidden.dtype == torch.float16 else 1.0


def _save(ctx: Any, inputs: Sequence[Any], *tensors: Tensor) -> None:
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
    """After the inputs: reduction, denominator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The loss; of a reduced one the gradients too."""
        head, task, reduction, denominator = grouped(arguments)
        ctx.made_for = _made_for(head.hidden, reduction, eager=True)
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
        if torch.is_grad_enabled() or ops.is_batched_by_autograd(upstream):
            return (
                *_differentiable(upstream, arguments[:_INPUTS], ops.as_tensor(ctx.scale), "exact", (saved,), needs),
                None,
                None,
            )
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


class LinearCrossEntropyUnderTransforms(Function):
    """The same for `torch.func` and `torch.compile`; after reduction and denominator: which gradients may be wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The loss; of a reduced one the gradients too."""
        *rest, wanted = arguments
        at_once = NOTHING if _made_for(rest[_HIDDEN], rest[_INPUTS], eager=False) is None else wanted
        out: tuple[Tensor, ...] = torch.ops.fastloss.linear_cross_entropy(*rest, *at_once)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs, and the gradients of a reduced loss."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.made = _made_for(inputs[_HIDDEN], inputs[_INPUTS], eager=False) is not None
        _save(ctx, inputs[:_INPUTS], *output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        """Hands out the gradients, times the upstream gradient."""
        inputs, (saved, scale, *made) = _saved(ctx)
        kind, tensors = ("made", (*made, saved)) if ctx.made else ("exact", (saved,))
        grads = _differentiable(upstream, inputs, scale, kind, tensors, ctx.needs_input_grad)
        return *grads, None, None, None


class LinearCrossEntropySampled(Function):
    """After the inputs: reduction, denominator, threshold, seed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The exact loss, and a sample of its gradient by the logits."""
        out: tuple[Tensor, ...] = torch.ops.fastloss.linear_cross_entropy_sampled(*arguments)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs and the sampled entries."""
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs[:_INPUTS], *output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        """Sums over the sampled entries."""
        inputs, (scale, *entries) = _saved(ctx)
        grads = _differentiable(upstream, inputs, scale, "sampled", tuple(entries), ctx.needs_input_grad)
        return *grads, None, None, None, None


class LinearCrossEntropySparse(Function):
    """The same with row-sparse gradients by weight and bias: for eager autograd, once."""

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


# ---- gradients that can be differentiated again ----------------------------------------------------------------------


def _differentiable(
    upstream: Tensor, inputs: list[Any], scale: Tensor, kind: str, tensors: tuple[Tensor, ...], needs: Sequence[bool]
) -> list[Any]:
    # A compiled backward is not differentiated again.
    make = _gradients if torch.compiler.is_compiling() else LinearGradient.apply
    wanted = _wanted(needs)
    grads: Any = [None] * 3
    if any(wanted):
        grads = make(*inputs, upstream, scale, kind, tuple(wanted), *tensors)
    by_target = None
    if needs[_TARGET]:
        (by_target,) = make(*inputs, upstream, scale, "target", (), tensors[-1])
    return _at_their_places(_INPUTS, grads, wanted, by_target)


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """By hidden states, weight and bias; or by the target."""
    inputs, (upstream, scale, kind, wanted, *tensors) = arguments[:_INPUTS], arguments[_INPUTS:]
    if kind == "made":
        return tuple((grad * upstream).to(grad.dtype) for grad in tensors[:3])
    if kind == "exact":
        return tuple(torch.ops.fastloss.linear_cross_entropy_backward(upstream, *inputs, *tensors, scale, *wanted))
    if kind == "sampled":
        return tuple(torch.ops.fastloss.linear_sampled_backward(upstream, *inputs[:4], *tensors, scale, *wanted))
    return (torch.ops.fastloss.linear_soft_target_gradient(upstream, *inputs, *tensors, scale),)


class LinearGradient(Function):
    """`_gradients` as a function with a derivative: that of the exact loss, of which sampled gradients are an estimate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """The kernels."""
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the inputs."""
        upstream, scale, ctx.kind, ctx.wanted, *tensors = inputs[_INPUTS:]
        ctx.count = len(tensors)
        _save(ctx, inputs[:_INPUTS], upstream, scale)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The plain formula, with all logits at once: correct, and slower."""
        inputs, (upstream, scale) = _saved(ctx)
        (hidden, *_), task = grouped(inputs)
        places = [place for place in (_HIDDEN, _WEIGHT, _BIAS) if inputs[place] is not None]
        if task.target.dtype in ops.CODES:
            places.append(_TARGET)
        if ctx.kind == "target":
            given = {_TARGET: cotangents[0]}
        else:
            triples = zip((_HIDDEN, _WEIGHT, _BIAS), cotangents, ctx.wanted, strict=True)
            given = {place: cotangent for place, cotangent, want in triples if want}

        def losses(*variables: Tensor) -> Tensor:
            at = dict(zip(places, variables, strict=True))
            logits = torch.nn.functional.linear(at[_HIDDEN], at[_WEIGHT], at.get(_BIAS))
            target = at.get(_TARGET, task.target)
            rows = plain.row_losses(logits, target, task.class_weight, task.logit_bias, task.options)
            scaled: Tensor = rows * scale.to(rows.dtype)
            return scaled

        variables = tuple(inputs[place] for place in places)
        of_places = tuple(given.get(place) for place in places)
        by_rows, by_variables = plain.vjp_of_vjp(losses, variables, upstream.expand(hidden.shape[0]), of_places)
        grads: list[Any] = [None] * (_INPUTS + 4 + ctx.count)
        for place, grad in zip(places, by_variables, strict=True):
            grads[place] = grad
        grads[_INPUTS] = by_rows.sum() if upstream.ndim == 0 else by_rows
        return tuple(grads)


# ---- statistics ------------------------------------------------------------------------------------------------------


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
        make = _statistics_gradients if torch.compiler.is_compiling() else LinearStatisticsGradient.apply
        wanted = _wanted(ctx.needs_input_grad)
        grads = make((wanted, ctx.chunk_tokens, *ctx.constants), *ctx.saved_tensors, *upstreams[:6])
        return tuple(_at_their_places(4 + 2 + 3, grads, wanted))


def _statistics_gradients(constants: Any, *tensors: Any) -> tuple[Tensor, ...]:
    """Coefficients of each token, then one kernel and the products."""
    wanted, chunk_tokens, softcap, temperature, want = constants
    hidden, weight, bias, target, logit_bias, saved, entropy, sum_sq_prob, max_prob, argmax, *upstreams = tensors
    coefficients, ids, factors = statistics_coefficients(
        target, weight.shape[0], saved, entropy, sum_sq_prob, max_prob, argmax, want, tuple(upstreams)
    )
    out = torch.ops.fastloss.linear_gradient(
        hidden, weight, bias, chunk_tokens, saved, coefficients, ids, factors, logit_bias, softcap, temperature, *wanted
    )
    return tuple(out)


class LinearStatisticsGradient(Function):
    """`_statistics_gradients` as a function that can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(constants: Any, *tensors: Any) -> tuple[Tensor, ...]:
        """The kernels."""
        return _statistics_gradients(constants, *tensors)

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
