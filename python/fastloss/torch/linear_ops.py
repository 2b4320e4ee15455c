# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy and statistics on matrices of tokens: logits of one chunk at a time, in place of a matrix of them all.

As in `ops`, each operation is a plain function over CPU tensors, which hands those of a GPU on (to `cuda_linear`);
`linear_operators` makes operators of PyTorch of them. Tokens with the ignored id are left out before the first product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastloss import _cpu
from fastloss._chunks import for_each_chunk
from fastloss._options import MEAN, NONE
from fastloss._sampled import Sampler, SparseGradient
from fastloss.torch import ops
from fastloss.torch.ops import CODES, Options, accumulation_dtype
from fastloss.torch.projection import NOTHING, Projection, Wanted, spread


class Head(NamedTuple):
    """The factors of the logits: hidden states (N, H), weight (V, H), bias (V) or None; and the most tokens of a chunk."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk_tokens: int | None


class Task(NamedTuple):
    """What a cross-entropy needs besides logits."""

    target: Tensor
    class_weight: Tensor | None
    logit_bias: Tensor | None
    options: Options

    def of(self, kept: Tensor | None) -> Task:
        """The same for some of the tokens."""
        return self if kept is None else self._replace(target=self.target.index_select(0, kept))

    def counted(self) -> Tensor | None:
        """The tokens that count, None for all of them. Checks the class ids of all."""
        if self.target.dtype in CODES:
            return None
        counts = self.target != self.options.ignore_index
        return None if bool(counts.all()) else counts.nonzero().squeeze(1)

    def denominator(self, tokens: int) -> float:
        """What the mean over these tokens, all of which count, divides by."""
        if self.class_weight is None or self.target.dtype in CODES:
            return float(tokens)
        return float(self.class_weight.double()[self.target.long()].numpy().sum())


class Loss(NamedTuple):
    """A linear cross-entropy: the loss, what backward needs of each token, the factor of the gradient (on a GPU a tensor)."""

    loss: Tensor
    saved: Tensor
    scale: float | Tensor


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether `cuda_linear` takes it."""
    return tensor.is_cuda


def _gpu() -> ModuleType:
    ops.gpu()
    from fastloss.torch import cuda_linear

    return cuda_linear


def _projection(head: Head, wanted: Wanted, kept: Tensor | None = None) -> Any:
    """Of all tokens, or of those that are kept, which a GPU is not asked for here."""
    if is_on_gpu(head.hidden):
        return _gpu().projection(head, wanted)
    return Projection(head.hidden, head.weight, head.bias, kept, head.chunk_tokens, wanted)


def check_ids(ids: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises IndexError for the first class id out of range; on a GPU with FASTLOSS_DEBUG=1 alone. The ids are contiguous."""
    if is_on_gpu(ids):
        _gpu().check_ids(ids, classes, ignore_index)
    else:
        _cpu.check_targets((ids.data_ptr(), ids.element_size()), ids.shape, classes, ignore_index)


def _forward(
    head: Head,
    task: Task,
    reduction: int,
    denominator: float | None,
    wanted: Wanted,
    upstream: float,
    sampled: Sampler | None,
) -> tuple[Loss, list[Tensor]]:
    if task.target.dtype not in CODES:
        check_ids(task.target, head.weight.shape[0], task.options.ignore_index)
    all_tokens = head.hidden.shape[0]
    kept = task.counted()
    task = task.of(kept)
    projection = _projection(head, wanted, kept)
    divisor = denominator if denominator is not None else task.denominator(projection.tokens) if reduction == MEAN else 1.0
    numbers = np.arange(all_tokens) if kept is None else kept.numpy()
    losses = [head.hidden.new_empty(0, dtype=accumulation_dtype(head.hidden.dtype))]
    saved = [head.hidden.new_empty((0, ops.saved_width(head.weight, head.weight.shape[0])), dtype=torch.float64)]

    def kernel(tokens: slice, logits: Tensor) -> None:
        sample = None if sampled is None else sampled.start(numbers[tokens])
        loss, rows, _ = ops.cross_entropy(
            logits,
            task.target[tokens],
            *task[1:],
            NONE,
            None if sampled else divisor or float("inf"),  # nothing counted: no gradient
            keep=True,
            grad=logits if any(wanted) else None,
            upstream=upstream,
            sampled=sample,
        )
        assert rows is not None
        losses.append(loss)
        saved.append(rows)

    for_each_chunk(projection, kernel, carry_back=any(wanted))
    rows = torch.cat(losses)
    if reduction == NONE:
        loss = spread(rows, kept, all_tokens)
    else:
        total = rows.numpy().sum(dtype=np.float64)  # in a fixed order, whatever the number of threads
        nothing = divisor == 0.0 and denominator is None
        loss = rows.new_tensor(math.nan if nothing else total / divisor)
    kept_rows = spread(torch.cat(saved), kept, all_tokens)
    return Loss(loss, kept_rows, 1.0 / divisor if divisor else 0.0), projection.gradients()


def cross_entropy(
    head: Head, task: Task, reduction: int, denominator: float | None, wanted: Wanted, upstream: float = 1.0
) -> tuple[Loss, list[Tensor]]:
    """The loss, and the wanted gradients of `upstream` times it by hidden states, weight and bias, from the same logits.

    On a GPU `upstream` is 1.
    """
    if is_on_gpu(head.hidden):
        on_gpu: tuple[Loss, list[Tensor]] = _gpu().cross_entropy(head, task, reduction, denominator, wanted)
        return on_gpu
    return _forward(head, task, reduction, denominator, wanted, upstream, None)


def cross_entropy_backward(
    upstream: Tensor, head: Head, task: Task, saved: Tensor, scale: float | Tensor, wanted: Wanted
) -> list[Tensor]:
    """The gradients, from logits that are made again; `upstream` is one number, or one a token."""
    if is_on_gpu(head.hidden):
        on_gpu: list[Tensor] = _gpu().cross_entropy_backward(upstream, head, task, saved, scale, wanted)
        return on_gpu
    kept = task.counted()
    task = task.of(kept)
    projection = _projection(head, wanted, kept)
    by_token = upstream.ndim > 0
    if kept is not None:
        saved = saved.index_select(0, kept)
        upstream = upstream.index_select(0, kept) if by_token else upstream

    def kernel(tokens: slice, logits: Tensor) -> None:
        ops.cross_entropy_backward(
            upstream[tokens] if by_token else upstream,
            logits,
            task.target[tokens],
            *task[1:3],
            saved[tokens],
            scale,
            task.options,
            grad=logits,
        )

    for_each_chunk(projection, kernel, carry_back=True)
    gradients: list[Tensor] = projection.gradients()
    return gradients


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiplies gradients that were made in forward by the upstream gradient, in place."""
    if is_on_gpu(upstream):
        _gpu().scale_gradients(gradients, upstream)
    else:
        for grad in gradients:
            grad.mul_(upstream)


def scaled_is_rounded_once(hidden: Tensor, upstream: Tensor) -> bool:
    """Whether gradients of 1 times the loss, multiplied by `upstream`, are as good as those of `upstream` times the loss.

    Of 16 bits by a power of two alone; a GPU, which is not waited for, does not ask.
    """
    if is_on_gpu(upstream) or hidden.element_size() > 2:
        return True
    return math.frexp(abs(upstream.item()))[0] == 0.5


def soft_target_gradient(upstream: Tensor, head: Head, task: Task, saved: Tensor, scale: float | Tensor) -> Tensor:
    """The gradient by target probabilities, from logits that are made again."""
    projection = _projection(head, NOTHING)
    out = ops.fresh(task.target)

    def kernel(tokens: slice, logits: Tensor) -> None:
        of_chunk = upstream[tokens] if upstream.ndim else upstream
        rest = (*task[1:3], saved[tokens], scale, task.options)
        out[tokens] = ops.soft_target_gradient(of_chunk, logits, task.target[tokens], *rest)

    for_each_chunk(projection, kernel, carry_back=False)
    return out


# ---- the sampled backward --------------------------------------------------------------------------------------------


Entries = Sequence[Tensor]  # what sampling kept, as its operators hand it on: start, columns, values; on a GPU as there


def cross_entropy_sampled(
    head: Head, task: Task, reduction: int, denominator: float | None, threshold: float, seed: Tensor
) -> tuple[Loss, Entries]:
    """The loss, and a sample of the gradient by the logits of each token's loss."""
    if is_on_gpu(head.hidden):
        on_gpu: tuple[Loss, Entries] = _gpu().cross_entropy_sampled(head, task, reduction, denominator, threshold, seed)
        return on_gpu
    sampler = Sampler(int(seed), threshold, np.float64 if head.hidden.dtype == torch.float64 else np.float32)
    loss, _ = _forward(head, task, reduction, denominator, NOTHING, 1.0, sampler)
    return loss, [torch.from_numpy(part) for part in sampler.entries(head.hidden.shape[0])]


def sampled_backward(upstream: Tensor, head: Head, kept: Entries, scale: float | Tensor, wanted: Wanted) -> list[Tensor]:
    """The gradients as sums over the kept entries, in a fixed order."""
    if is_on_gpu(head.hidden):
        on_gpu: list[Tensor] = _gpu().sampled_backward(upstream, head, kept, scale, wanted)
        return on_gpu
    entries = _scaled(kept, upstream, scale)
    hidden, weight = head.hidden.contiguous(), head.weight.contiguous()
    classes = weight.shape[0]
    by_hidden, by_weight, by_bias = (weight.new_empty(0) for _ in wanted)
    if wanted.hidden:
        by_hidden = ops.fresh_matrix(hidden.shape, weight.dtype)
        entries.multiply(ops.describe(weight, 1), ops.describe(by_hidden, 1))
    if wanted.weight:
        by_weight = ops.fresh_matrix(weight.shape, weight.dtype)
        entries.transposed(classes).multiply(ops.describe(hidden, 1), ops.describe(by_weight, 1))
    if wanted.bias:
        by_bias = torch.from_numpy(entries.column_sums(classes)).to(weight.dtype)
    return [by_hidden, by_weight, by_bias]


def sparse_backward(upstream: Tensor, head: Head, kept: Entries, scale: float | Tensor, wanted: Wanted) -> list[Tensor]:
    """The same bits, those by weight and bias as coalesced sparse tensors of the classes that have an entry."""
    if is_on_gpu(head.hidden):
        on_gpu: list[Tensor] = _gpu().sparse_backward(upstream, head, kept, scale, wanted)
        return on_gpu
    gradients = sampled_backward(upstream, head, kept, scale, Wanted(wanted.hidden, False, False))
    entries, hidden, weight = _scaled(kept, upstream, scale), head.hidden.contiguous(), head.weight
    by_class, ids = entries.transposed(weight.shape[0]).without_empty_rows()
    # Each tensor is the only owner of its ids and values: then autograd takes it over as it is.
    if wanted.weight:
        rows = ops.fresh_matrix((by_class.rows, weight.shape[1]), weight.dtype)
        by_class.multiply(ops.describe(hidden, 1), ops.describe(rows, 1))
        gradients[1] = of_classes(torch.from_numpy(ids.copy()), rows, weight)
    if wanted.bias:
        sums = torch.from_numpy(entries.column_sums(weight.shape[0])[ids])
        gradients[2] = of_classes(torch.from_numpy(ids.copy()), sums.to(weight.dtype), weight[:, 0])
    return gradients


def of_classes(ids: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """Rows of some classes, in their order, as a sparse tensor of all of them."""
    return torch.sparse_coo_tensor(ids[None], values, factor.shape, check_invariants=False, is_coalesced=True)


def _scaled(kept: Entries, upstream: Tensor, scale: float | Tensor) -> SparseGradient:
    start, columns, values = kept
    count = int(start[-1])  # after them vmap may have put zeros
    entries = SparseGradient(start.numpy(), columns[:count].numpy(), values[:count].numpy())
    upstream = ops.upstream_of(upstream).to(torch.float64)
    return entries.scaled((upstream * scale).numpy())


# ---- statistics ------------------------------------------------------------------------------------------------------


def statistics(
    head: Head, target: Tensor | None, logit_bias: Tensor | None, softcap: float, temperature: float, want: Sequence[bool]
) -> list[Tensor]:
    """The eight statistics, empty where not wanted, and `saved`."""
    if target is not None:
        check_ids(target.contiguous(), head.weight.shape[0], None)
    projection = _projection(head, NOTHING)
    chunks: list[list[Tensor]] = []

    def kernel(tokens: slice, logits: Tensor) -> None:
        ids = None if target is None else target[tokens]
        chunks.append(ops.statistics(logits, ids, logit_bias, 1, softcap, temperature, want))

    for_each_chunk(projection, kernel, carry_back=False)
    if not chunks:
        none = head.hidden.new_empty((0, head.weight.shape[0]))
        return ops.stats_outputs(none, target, 1, want)
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def gradient(
    head: Head,
    saved: Tensor,
    coefficients: Tensor,
    target: Tensor | None,
    target_coefficients: Tensor | None,
    logit_bias: Tensor | None,
    softcap: float,
    temperature: float,
    wanted: Wanted,
) -> list[Tensor]:
    """The gradients of statistics, from logits that are made again."""
    projection = _projection(head, wanted)

    def kernel(tokens: slice, logits: Tensor) -> None:
        ids, factors = (None if part is None else part[tokens] for part in (target, target_coefficients))
        ops.gradient(
            logits, saved[tokens], coefficients[tokens], ids, factors, logit_bias, 1, softcap, temperature, inplace=True
        )

    for_each_chunk(projection, kernel, carry_back=True)
    gradients: list[Tensor] = projection.gradients()
    return gradients
