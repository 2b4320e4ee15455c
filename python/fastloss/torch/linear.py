# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy and statistics of tensors: hidden states and weights in, logits never stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastloss import _options
from fastloss._options import STATISTICS, LogitStats
from fastloss.torch import linear_ops, ops, plain
from fastloss.torch.arguments import divided, divides_afterwards, loss_options, per_class
from fastloss.torch.linear_arguments import (
    DEFAULT_IGNORE_INDEX,
    check_factors,
    check_seed,
    check_sparse,
    check_sparse_factors,
    check_statistics_ids,
    check_target,
    chunk_size_of,
    counted,
    device_type,
    seed_tensor,
    split_places,
    under_autocast,
)
from fastloss.torch.linear_autograd import LinearCrossEntropy, LinearCrossEntropySparse, wanted_of_operator
from fastloss.torch.linear_operators import grouped
from fastloss.torch.projection import NOTHING


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backward: str = "exact",
    threshold: float = 1 / 64,
    seed: int | torch.Generator | None = None,
    sparse: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor:
    r"""`cross_entropy(linear(input, linear_weight, linear_bias), target)` with the logits of a few tokens at a time.

    It takes the calls of `torch.nn.functional.linear_cross_entropy`. The formula of the loss stands at
    :func:`fastloss.torch.cross_entropy`. Tokens with the ignored id are left out before the first product.

    ``backward="exact"``: a reduced loss makes its gradients in forward, chunk by chunk, while the logits are there: three
    matrix products in all. Losses of single tokens (``reduction="none"``) make the logits once more in backward.

    ``backward="sampled"``: of the gradient c by the logits of a token few entries are kept, at random: with u uniform in
    (0, 1], t the threshold and s the factor of the token's probabilities (1 / temperature for a plain cross-entropy), an entry
    is kept if ``abs(c_j) > u * t * s``, as ``sign(c_j) * max(abs(c_j), t * s)``; the target's is always kept as it is. The
    expectation of every entry is exactly c_j, its variance at most ``t * s * abs(c_j)``: t times the variance that the label
    itself has. On average at most ``1 / t`` entries and the target's are kept (with label smoothing or probabilities up to
    ``2 / t``: where a z-loss leaves s smaller than what those add to the other entries, s is the mean of both), whatever
    the number of classes, so that the two products of backward become short sums. The loss is exact. Random numbers are a
    hash of seed, token and class: for the same logits neither threads, chunks nor instruction set change a bit. On a CPU the
    bits of the logits themselves do not depend on threads or chunks either (see the README).

    Args:
        input: hidden states ``(..., H)``; float32, float64, float16 or bfloat16.
        linear_weight: ``(C, H)``; or ``(C, d1, ..., dK, H)`` for inputs ``(N, H)``, as in PyTorch.
        target: class ids ``(...)``, or probabilities ``(..., C)``; with K further dimensions ``(N, d1, ...)``, or
            ``(N, C, d1, ...)``.
        linear_bias: ``(C)``, or ``(C, d1, ..., dK)``.
        weight: class weights ``(C)``; a constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: tokens with this id count nothing; None stands for -100. Not for probabilities.
        label_smoothing: eps in [0, 1]; it, `z_loss`, `softcap`, `temperature` and `denominator` may be 0-d tensors, whose
            values are read.
        options: a `torch.nn.LinearCrossEntropyOptions`, for its `batch_chunk_size`; everything else in it is of no use here.
        z_loss: factor of the squared log-sum-exp, at least 0.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits first, positive.
        logit_bias: one number a class, added to the transformed logits, shape ``(C)``; a constant.
        denominator: positive number or 0-d tensor that divides the sum in place of the counted weights.
        backward: ``"exact"`` or ``"sampled"``.
        threshold: t in (0, 1], for the sampled backward.
        seed: an int, as `torch.manual_seed` takes it, or a `torch.Generator`, for the sampled backward; by default a number
            drawn from PyTorch's generator, the only one that `torch.compile` takes. The same int makes the same sample at each
            call: pass another one each step. Of a weight with further dimensions, place
            i in row-major order has the seed ``seed + i * 0x9E3779B97F4A7C15`` modulo 2**64. Under `torch.vmap` a given one
            serves every sample; drawn ones follow its `randomness`.
        sparse: for the sampled backward: the gradients by `linear_weight` ``(C, H)`` and `linear_bias` are sparse tensors with
            a row for each class that has an entry, sorted by class, as `torch.nn.Embedding` with ``sparse=True`` has them and
            `torch.optim.SparseAdam` and `torch.optim.SGD` take them. Each row has the bits of the dense gradient, which is not
            made. Not under `torch.compile` or `torch.func`, nor for second derivatives. On a GPU, backward waits for the number
            of such classes.
        chunk_tokens: tokens whose logits are made at a time; by default as many as have 2**26 logits, on a GPU 512 MiB. All of
            them, where a 16-bit gradient by the weights is made and one chunk takes no more memory than the float32 sum over
            several, which it does not need; on a GPU also what takes no more memory in all.

    Returns:
        The loss: float64 for float64 inputs and else float32; a scalar, or one number a token for ``"none"``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or options that do not fit.
        IndexError: a class id out of range; on a GPU it makes its token NaN, and raises with `FASTLOSS_DEBUG=1` alone.
        NotImplementedError: tensors on neither the CPU nor a CUDA device; `sparse` under a transform or in a second
            derivative.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", tuple(hidden.grad.shape), tuple(head.grad.shape))
        0.3955 (2, 2) (3, 2)

    Source:
        The loss: see :func:`fastloss.torch.cross_entropy`.
        The sampling rule: Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed Optimization" (2018).
    """
    check_factors(input, linear_weight, linear_bias)
    sampled = _options.backward_code(backward)
    _options.check_flag("sparse", sparse)
    if sparse:
        check_sparse(sampled, linear_weight.shape[1:-1])
        check_sparse_factors(input, linear_weight, linear_bias)
    rows, places = input.shape[:-1], linear_weight.shape[1:-1]
    divisor: float | Tensor | None = None
    if denominator is not None and divides_afterwards(denominator, reduction, input):
        divisor, denominator, reduction = denominator, None, "sum"
    checked = loss_options(
        DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        temperature,
        denominator,
    )
    code = checked.reduction
    target = check_target(input, target, (*rows, linear_weight.shape[0], *places), len(rows), ignore_index)
    class_weight = None if weight is None else per_class("weight", weight, linear_weight, 0)
    logit_bias = None if logit_bias is None else per_class("logit_bias", logit_bias, linear_weight, 0)
    chunk = chunk_size_of(chunk_tokens, options)
    threshold, seed = _options.threshold(threshold), check_seed(seed)

    count: Tensor | None = None
    if places and code == _options.MEAN and checked.denominator is None:
        count, code = counted(target, class_weight, checked.ignore_index), _options.SUM
    hidden = input.reshape(math.prod(rows), input.shape[-1])
    if not places:
        target = target.reshape(hidden.shape[0], *target.shape[len(rows) :])
    choices = (checked.ignore_index, checked.label_smoothing, checked.z_loss, checked.softcap, checked.temperature)
    losses = []
    for place, (matrix, bias, ids) in enumerate(split_places(linear_weight, linear_bias, target)):
        factors = under_autocast(hidden, matrix, bias)
        arguments = (*factors, chunk, ids, class_weight, logit_bias, *choices, code, checked.denominator)
        of_place = _options.seed_of_place(seed, place) if isinstance(seed, int) else seed
        losses.append(_run(arguments, sampled, threshold, of_place, sparse))
    loss = torch.stack(losses, -1) if places else losses[0]
    if code == _options.NONE:
        return loss.reshape((*rows, *places))
    loss = loss.sum() if places else loss
    if count is not None:
        return plain.mean(loss, count)
    return loss if divisor is None else divided(loss, divisor)


def _run(
    arguments: tuple[Any, ...], sampled: bool, threshold: float, seed: int | torch.Generator | None, sparse: bool
) -> Tensor:
    hidden, weight, bias, _, target, class_weight, logit_bias = arguments[:7]
    tensors = (hidden, weight, bias, target)
    eager = ops.eager(*tensors, class_weight, logit_bias)
    # What is transformed may need gradients that it does not tell of, and what is traced may later be called with others.
    asked = not eager or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    needs = ops.is_traced() or (torch.is_grad_enabled() and asked)
    loss: Tensor
    with torch.autocast(device_type(hidden), enabled=False):
        if ops.forward_mode():
            loss = _plain(arguments)
        elif needs and sampled:
            if target.requires_grad:
                raise ValueError("target gets no gradient from backward='sampled': pass target.detach()")
            if sparse:
                loss = LinearCrossEntropySparse.apply(*arguments, threshold, seed_tensor(seed, hidden.device))
            else:
                sample = (threshold, seed_tensor(seed, hidden.device))
                loss = torch.ops.fastloss.linear_cross_entropy_sampled(*arguments, *sample)[0]
        elif needs and eager:
            loss = LinearCrossEntropy.apply(*arguments)
        elif eager:
            head, task, reduction, denominator = grouped(arguments)
            loss = linear_ops.cross_entropy(head, task, reduction, denominator, NOTHING)[0].loss
        else:
            wanted = wanted_of_operator(hidden, weight, bias, arguments[-2])
            loss = torch.ops.fastloss.linear_cross_entropy(*arguments, *wanted)[0]
    return loss


def _plain(arguments: tuple[Any, ...]) -> Tensor:
    (hidden, head, bias, _), task, reduction, denominator = grouped(arguments)
    logits = plain.linear(hidden, head, bias, task.target, task.options.ignore_index)
    rest = (task.target, task.class_weight, task.logit_bias, task.options, reduction, denominator)
    return plain.cross_entropy(logits, *rest)


def linear_logit_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    want: str | Iterable[str] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LogitStats:
    """`logit_stats(linear(hidden, weight, bias), target)` with the logits of a few tokens at a time.

    Log-probabilities and entropies of single tokens for preference and RL training. All but ``argmax`` and ``rank`` are
    differentiable; backward makes the logits again, a chunk at a time.

    Args:
        hidden: hidden states ``(..., H)``; float32, float64, float16 or bfloat16.
        weight: ``(C, H)``, of the dtype of `hidden`.
        target: class ids ``(...)``, or ``(..., K)`` for K ids a token.
        bias: ``(C)``, part of the linear map, differentiable.
        want: names of statistics, see :func:`fastloss.torch.logit_stats`.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits first, positive.
        logit_bias: one number a class, added to the transformed logits; a constant.
        chunk_tokens: tokens whose logits are made at a time; by default as many as have 2**26 logits, on a GPU 512 MiB or what
            takes no more memory in all.

    Returns:
        A :class:`fastloss.LogitStats` with the wanted fields set, of shape ``(...)``; ``logprob`` and ``rank`` of the shape of
        `target`.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, names or options that do not fit.
        IndexError: a class id out of range; on a GPU it makes its token NaN, and raises with `FASTLOSS_DEBUG=1` alone.
        NotImplementedError: tensors on neither the CPU nor a CUDA device.

    Example:
        >>> import torch
        >>> stats = linear_logit_stats(torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([3, 5]), want=("logprob", "entropy"))
        >>> print(stats.logprob.exp(), stats.entropy.exp())
        tensor([0.1250, 0.1250]) tensor([8., 8.])

    Source:
        That of the statistics, see :func:`fastloss.torch.logit_stats`.
    """
    check_factors(hidden, weight, bias, ("hidden", "weight", "bias"))
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (C, H), got {tuple(weight.shape)}")
    rows = hidden.shape[:-1]
    heat, cap = _options.transform_options(temperature, softcap)
    names = _options.wanted_statistics(want, target is not None)
    ids = None if target is None else check_statistics_ids(target, hidden, weight.shape[0])
    logit_bias = None if logit_bias is None else per_class("logit_bias", logit_bias, weight, 0)
    wanted = tuple(name in names or (name == "argmax" and "max_prob" in names) for name in STATISTICS)
    chunk = chunk_size_of(chunk_tokens, None)
    factors = under_autocast(hidden.reshape(math.prod(rows), hidden.shape[-1]), weight, bias)
    with torch.autocast(device_type(hidden), enabled=False):
        if ops.forward_mode():
            outputs = plain.all_statistics(torch.nn.functional.linear(*factors), ids, logit_bias, 1, cap, heat, wanted)
        else:
            outputs = torch.ops.fastloss.linear_statistics(*factors, chunk, ids, logit_bias, cap, heat, wanted)
    found = {}
    for name, out in zip(STATISTICS, outputs[:-1], strict=True):
        if name in names:
            found[name] = out.reshape(rows if target is None or name not in _options.TARGET_STATISTICS else target.shape)
    return LogitStats(**found)
