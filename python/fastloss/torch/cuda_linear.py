# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy of CUDA tensors: what `linear_ops` does for the CPU. Products are cuBLAS's, memory is PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import _cpu, _cuda
from fastloss._chunks import for_each_chunk
from fastloss._options import NONE
from fastloss._sampled import slots_of_token
from fastloss.torch import cuda, ops
from fastloss.torch.cuda_projection import Order, Projection
from fastloss.torch.linear_ops import Entries, Head, Loss, Task, of_classes
from fastloss.torch.ops import CODES, accumulation_dtype
from fastloss.torch.projection import NOTHING, Wanted

MOST_ENTRIES = 2**31 - 1  # that sampling sets places apart for


def check_ids(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises IndexError for a class id out of range where FASTLOSS_DEBUG=1 asks for that; else its token becomes NaN."""
    if cuda.DEBUG and target.dtype not in CODES:
        cuda.check_ids(target, classes, ignore_index)


def projection(head: Head, wanted: Wanted) -> Projection:
    """Of all tokens, in their own order."""
    return Projection(*head, wanted)


def _order(head: Head, task: Task) -> tuple[Order | None, Task]:
    """The order of class ids, and the task in it; probabilities all count."""
    if task.target.dtype in CODES:
        return None, task
    order = Order(task.target != task.options.ignore_index, always=head.chunk_tokens is not None)
    return order, task._replace(target=order.apply(task.target))


def _forward(
    head: Head, task: Task, reduction: int, denominator: float | None, wanted: Wanted, sampler: _Sampler | None
) -> tuple[Loss, list[Tensor]]:
    hidden, classes = head.hidden, head.weight.shape[0]
    check_ids(task.target, classes, task.options.ignore_index)
    order, task = _order(head, task)
    projection = Projection(*head, wanted, order)
    where, tokens = cuda.where(hidden), hidden.shape[0]
    sums = accumulation_dtype(hidden.dtype)
    # Zeros: what tokens have that come in no chunk.
    losses = hidden.new_zeros(tokens, dtype=sums if reduction == NONE else torch.float64)
    saved = hidden.new_zeros((tokens, _cpu.SAVED_FIELDS), dtype=torch.float64)
    scale = hidden.new_empty((), dtype=torch.float64)
    loss = hidden.new_empty((), dtype=sums)
    numbers = None if order is None else order.tokens
    if numbers is None and sampler is not None:
        numbers = torch.arange(tokens, device=hidden.device)

    def reduce(losses: Tensor | None) -> None:
        room = hidden.new_empty(_cuda.REDUCTION_BYTES, dtype=torch.uint8)
        ids = None if task.target.dtype in CODES else ops.ids_of(task.target)
        of_tokens = (tokens, classes, CODES[hidden.dtype], ids, ops.address(task.class_weight), task.options.ignore_index)
        out = (ops.address(losses), loss.data_ptr(), scale.data_ptr())
        _cuda.reduce_tokens(*of_tokens, reduction, denominator, *out, room.data_ptr(), *where)

    def kernel(chunk: slice, logits: Tensor) -> None:
        call = ops.call_of(logits, task.target[chunk], *task[1:])
        rows = saved[chunk]
        room = cuda.workspace(logits, task.options.dim, where)
        grad = ops.describe(logits, task.options.dim) if any(wanted) else None
        loss_of_tokens = (losses[chunk].data_ptr(), reduction != NONE)
        _cuda.cross_entropy_chunk(call, scale.data_ptr(), *loss_of_tokens, rows.data_ptr(), grad, room.data_ptr(), *where)
        if sampler is not None and numbers is not None:
            sampler.sample(call, rows, numbers[chunk], where)

    if any(wanted) or reduction == NONE:
        reduce(None)  # gradients ask for the denominator before the losses are there
    for_each_chunk(projection, kernel, carry_back=any(wanted))
    if reduction != NONE:
        reduce(losses)
    else:
        loss = losses if order is None else order.undo(losses)
    return Loss(loss, saved if order is None else order.undo(saved), scale), projection.gradients()


@cuda.on_its_gpu
def cross_entropy(
    head: Head, task: Task, reduction: int, denominator: float | None, wanted: Wanted
) -> tuple[Loss, list[Tensor]]:
    """As `linear_ops.cross_entropy`, with the factor of the gradient as a tensor."""
    return _forward(head, task, reduction, denominator, wanted, None)


@cuda.on_its_gpu
def cross_entropy_backward(
    upstream: Tensor, head: Head, task: Task, saved: Tensor, scale: Tensor, wanted: Wanted
) -> list[Tensor]:
    """As `linear_ops.cross_entropy_backward`."""
    order, task = _order(head, task)
    projection = Projection(*head, wanted, order)
    by_token = upstream.ndim > 0
    if order is not None:
        saved = order.apply(saved)
        upstream = order.apply(upstream) if by_token else upstream

    def kernel(tokens: slice, logits: Tensor) -> None:
        of_tokens = upstream[tokens] if by_token else upstream
        rest = (*task[1:3], saved[tokens], scale, task.options)
        ops.cross_entropy_backward(of_tokens, logits, task.target[tokens], *rest, grad=logits)

    for_each_chunk(projection, kernel, carry_back=True)
    return projection.gradients()


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiplies in place, at no cost where the upstream gradient is 1."""
    for grad in filter(Tensor.numel, gradients):
        cuda.scale(grad, upstream)


# ---- the sampled backward --------------------------------------------------------------------------------------------


class _Sampler:
    """Collects what sampling keeps: places for each token, filled on the GPU."""

    def __init__(self, head: Head, task: Task, threshold: float, seed: Tensor) -> None:
        hidden, tokens, classes = head.hidden, head.hidden.shape[0], head.weight.shape[0]
        plain = task.target.dtype not in CODES and task.options.label_smoothing == 0.0
        self._slots = slots_of_token(threshold, classes, plain)
        if tokens * self._slots > MOST_ENTRIES:
            raise ValueError(
                f"input has {tokens} tokens with places for {self._slots} entries each, more than the {MOST_ENTRIES} in all"
                " that PyTorch sorts on a GPU: pass fewer tokens at a time or a larger threshold"
            )
        self._threshold = threshold
        self._seed = seed
        self.count = hidden.new_zeros(tokens, dtype=torch.int64)
        # Places that stay empty come behind all classes.
        self.columns = hidden.new_full((tokens, self._slots), classes, dtype=torch.int32)
        self.values = hidden.new_zeros((tokens, self._slots), dtype=accumulation_dtype(hidden.dtype))

    def sample(self, call: _cpu.Call, saved: Tensor, numbers: Tensor, where: tuple[int, int]) -> None:
        """Keeps entries of a chunk whose tokens have these numbers."""
        places = (self._slots, self.count.data_ptr(), self.columns.data_ptr(), self.values.data_ptr())
        random = (self._seed.data_ptr(), self._threshold, numbers.data_ptr())
        _cuda.sample_chunk(call, saved.data_ptr(), random, places, *where)


@cuda.on_its_gpu
def cross_entropy_sampled(
    head: Head, task: Task, reduction: int, denominator: float | None, threshold: float, seed: Tensor
) -> tuple[Loss, Entries]:
    """The loss, and of each token how many entries it kept, their columns and values: the first of its places."""
    sampler = _Sampler(head, task, threshold, seed)
    loss, _ = _forward(head, task, reduction, denominator, NOTHING, sampler)
    return loss, (sampler.count, sampler.columns, sampler.values)


class _Sums:
    """Sums over the kept entries of a loss, times its upstream gradient: of each token, or of each class."""

    def __init__(self, upstream: Tensor, head: Head, entries: Entries, scale: Tensor) -> None:
        count, columns, values = entries
        self.hidden, self.weight = head.hidden.contiguous(), head.weight.contiguous()
        self._entries = entries
        self._factors = (upstream.to(torch.float64) * scale).expand(len(self.hidden)).contiguous()
        self._places = (columns.shape[1], count.data_ptr(), columns.data_ptr(), values.data_ptr())
        self._code, self._where = CODES[self.weight.dtype], cuda.where(self.hidden)

    def by_hidden(self) -> Tensor:
        """The gradient by the hidden states."""
        return self._multiply(len(self.hidden), 0, 0, self.weight)

    def order(self) -> tuple[Tensor, Tensor]:
        """Where the places of each class begin, and the places: those of a class in the order of the tokens."""
        columns, order = self._entries[1].flatten().sort(stable=True)  # empty ones come last
        classes = torch.arange(len(self.weight) + 1, dtype=torch.int32, device=columns.device)
        return torch.searchsorted(columns, classes), order

    def by_weight(self, start: Tensor, order: Tensor) -> Tensor:
        """The gradient by the weights of the classes that begin there."""
        return self._multiply(len(start) - 1, start.data_ptr(), order.data_ptr(), self.hidden)

    def by_bias(self, start: Tensor, order: Tensor) -> Tensor:
        """The same by the bias."""
        out = self.weight.new_empty(len(start) - 1)
        by_class = (self._places, self._factors.data_ptr(), start.data_ptr(), order.data_ptr())
        _cuda.row_sums(len(out), *by_class, self._code, out.data_ptr(), *self._where)
        return out

    def _multiply(self, rows: int, start: int, order: int, matrix: Tensor) -> Tensor:
        out = matrix.new_empty((rows, matrix.shape[1]))
        sparse = (rows, self._places, self._factors.data_ptr(), start, order)
        _cuda.multiply(*sparse, self._code, matrix.data_ptr(), matrix.shape[1], out.data_ptr(), *self._where)
        return out


@cuda.on_its_gpu
def sampled_backward(upstream: Tensor, head: Head, entries: Entries, scale: Tensor, wanted: Wanted) -> list[Tensor]:
    """The gradients as sums over the kept entries, in a fixed order."""
    sums = _Sums(upstream, head, entries, scale)
    by_hidden, by_weight, by_bias = (head.weight.new_empty(0) for _ in wanted)
    if wanted.hidden:
        by_hidden = sums.by_hidden()
    if wanted.weight or wanted.bias:
        start, order = sums.order()
        by_weight = sums.by_weight(start, order) if wanted.weight else by_weight
        by_bias = sums.by_bias(start, order) if wanted.bias else by_bias
    return [by_hidden, by_weight, by_bias]


@cuda.on_its_gpu
def sparse_backward(upstream: Tensor, head: Head, entries: Entries, scale: Tensor, wanted: Wanted) -> list[Tensor]:
    """As `linear_ops.sparse_backward`. Waits for the GPU: to take memory, the number of classes must be known."""
    sums = _Sums(upstream, head, entries, scale)
    by_hidden, by_weight, by_bias = (head.weight.new_empty(0) for _ in wanted)
    if wanted.hidden:
        by_hidden = sums.by_hidden()
    if wanted.weight or wanted.bias:
        start, order = sums.order()
        ids = start.diff().nonzero().squeeze(1)
        start = torch.cat([start[ids], start[-1:]])
        # Each tensor is the only owner of its ids.
        by_weight = of_classes(ids.clone(), sums.by_weight(start, order), head.weight) if wanted.weight else by_weight
        by_bias = of_classes(ids, sums.by_bias(start, order), head.weight[:, 0]) if wanted.bias else by_bias
    return [by_hidden, by_weight, by_bias]
