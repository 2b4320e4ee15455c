# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy of CUDA tensors: products through cuBLAS, and our kernels between them. `linear_ops` for the GPU.

All memory is PyTorch's, and the GPU is never idle for the host's sake. How many tokens count is known to the GPU alone, so the
tokens that count are put first, in their order, and the rest takes part with gradients of zero: the same bits wherever the work
ends. It may end after any chunk behind which no token counts. Where the last call ignored tokens, this one asks for its number,
but only after its first chunk is on the way, which keeps the GPU busy meanwhile; else the host never waits. A call of one chunk
has nothing to leave out, and under graph capture nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastloss import _cuda
from fastloss._chunks import check_chunk_tokens, for_each_chunk, slices
from fastloss._options import NONE
from fastloss._sampled import slots_of_token
from fastloss.torch import cuda, ops
from fastloss.torch.linear_ops import Head, Loss, Task
from fastloss.torch.ops import CODES, accumulation_dtype
from fastloss.torch.projection import NOTHING, Wanted

CHUNK_BYTES = 1 << 30  # of logits: each chunk reads and writes the float32 sum by the weights once more
_TILE = 128  # tokens: what a product takes at a time
_LINE = 128  # bytes: where rows of logits begin
_BLOCK_BYTES = 1 << 28  # of a product in float32 where cuBLAS cannot add to the sum itself

# Sums of 16-bit factors in float32, added to a float32 matrix: from this PyTorch on.
_HAS_WIDE_SUMS = torch.__version__ >= (2, 10)


# ---- which tokens count ----------------------------------------------------------------------------------------------


class Count:
    """How many tokens of a call count: a number on its way from the GPU to the host."""

    def __init__(self, counts: Tensor) -> None:
        """Takes a bool for each token."""
        self._tokens = counts.numel()
        self._number = torch.empty((), dtype=torch.int64, pin_memory=True)
        self._number.copy_(counts.sum(), non_blocking=True)
        self._event = torch.cuda.current_stream(counts.device).record_event()

    def has_arrived(self) -> bool:
        """Whether it is there without waiting."""
        return bool(self._event.query())

    def wait(self) -> int:
        """The number."""
        self._event.synchronize()
        return int(self._number)

    def is_all(self) -> bool:
        """Whether every token counts."""
        return self.wait() == self._tokens


_last: dict[torch.device, Count] = {}
_ignoring: dict[torch.device, bool] = {}


def _count_worth_waiting_for(counts: Tensor) -> Count | None:
    """The number of this call where the last one known ignored tokens."""
    device = counts.device
    if torch.cuda.is_current_stream_capturing():
        return None
    last = _last.get(device)
    arrived = last is None or last.has_arrived()
    if last is not None and arrived:
        _ignoring[device] = not last.is_all()
    count = Count(counts)
    if arrived:
        _last[device] = count
    return count if _ignoring.get(device) else None


class Order:
    """The tokens of a call, those that count first."""

    def __init__(self, counts: Tensor) -> None:
        """Takes a bool for each token."""
        ignored = ~counts
        self.tokens = ignored.to(torch.uint8).argsort(stable=True)
        self._ignored = self.apply(ignored)
        self._count = _count_worth_waiting_for(counts)

    def apply(self, rows: Tensor) -> Tensor:
        """Rows in this order."""
        return rows.index_select(0, self.tokens)

    def apply_to_hidden(self, hidden: Tensor) -> Tensor:
        """As `apply`; zeros for ignored tokens, whose hidden states may hold anything."""
        return self.apply(hidden).masked_fill_(self._ignored[:, None], 0)

    def undo(self, rows: Tensor) -> Tensor:
        """Rows at the places of their tokens again."""
        return torch.empty_like(rows).index_copy_(0, self.tokens, rows)

    def ends_before(self, token: int) -> bool:
        """Whether no token counts from this one on, as far as anybody asks."""
        return self._count is not None and self._count.wait() <= token


def _order(task: Task) -> tuple[Order | None, Task]:
    """The order of class ids, and the task in it; probabilities all count."""
    if task.target.dtype in CODES:
        return None, task
    order = Order(task.target != task.options.ignore_index)
    return order, task._replace(target=order.apply(task.target))


def check_ids(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises IndexError for a class id out of range where FASTLOSS_DEBUG=1 asks for that; else its token becomes NaN."""
    if cuda.DEBUG and target.dtype not in CODES:
        cuda.check_ids(target, classes, ignore_index)


# ---- products --------------------------------------------------------------------------------------------------------


class Projection:
    """As `projection.Projection`, but for the tokens that count: those of `order` come first."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_tokens: int | None = None,
        wanted: Wanted = NOTHING,
        order: Order | None = None,
    ) -> None:
        """Takes the factors."""
        self._order = order
        self._hidden = hidden.contiguous() if order is None else order.apply_to_hidden(hidden)
        self._weight, self._bias = weight, bias
        self._tokens, classes = hidden.shape[0], weight.shape[0]
        self._size = chunk_size(chunk_tokens, self._tokens, classes * weight.element_size())
        line = _LINE // weight.element_size()
        self._room = weight.new_empty((self._size, -(-classes // line) * line))[:, :classes]
        self._grad_hidden = torch.empty_like(self._hidden) if wanted.hidden else None
        # Several chunks add up in the accumulation type; one is rounded once by its product.
        sums = weight.dtype if self._tokens <= self._size else accumulation_dtype(weight.dtype)
        self._sum_weight = weight.new_empty(weight.shape, dtype=sums) if wanted.weight else None
        self._sum_bias = weight.new_zeros(classes, dtype=accumulation_dtype(weight.dtype)) if wanted.bias else None

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk, as long as some of them count."""
        for tokens in slices(self._tokens, self._size):
            if tokens.start > 0 and self._order is not None and self._order.ends_before(tokens.start):
                if self._grad_hidden is not None:
                    self._grad_hidden[tokens.start :].zero_()
                return
            yield tokens

    def logits(self, tokens: slice) -> Tensor:
        """The logits of a chunk, in memory that the next chunk overwrites."""
        out = self._room[: tokens.stop - tokens.start]
        if self._bias is None:
            torch.mm(self._hidden[tokens], self._weight.t(), out=out)
        else:
            torch.addmm(self._bias, self._hidden[tokens], self._weight.t(), out=out)
        return out

    def carry_back(self, tokens: slice, grad: Tensor) -> None:
        """Adds what a gradient by the logits of a chunk gives to the wanted gradients."""
        if self._grad_hidden is not None:
            hidden_product(grad, self._weight, self._grad_hidden[tokens])
        if self._sum_weight is not None:
            weight_product(grad, self._hidden[tokens], self._sum_weight, add=tokens.start > 0)
        if self._sum_bias is not None:
            self._sum_bias += grad.sum(0, dtype=self._sum_bias.dtype)

    def gradients(self) -> list[Tensor]:
        """The gradients by hidden states, weight and bias; empty where they are not wanted."""
        by_hidden, by_weight, by_bias = (self._weight.new_empty(0) for _ in range(3))
        if self._grad_hidden is not None:
            by_hidden = self._grad_hidden if self._order is None else self._order.undo(self._grad_hidden)
        if self._sum_weight is not None:
            by_weight = (self._sum_weight if self._tokens else self._sum_weight.zero_()).to(self._weight.dtype)
        if self._sum_bias is not None:
            by_bias = self._sum_bias.to(self._weight.dtype)
        return [by_hidden, by_weight, by_bias]


def chunk_size(wanted: int | None, tokens: int, token_bytes: int) -> int:
    """Tokens of a chunk: the wanted number, or even chunks of CHUNK_BYTES of logits at most, in whole tiles of a product."""
    if wanted is not None:
        return min(max(1, tokens), check_chunk_tokens(wanted))
    chunks = -(-tokens * token_bytes // CHUNK_BYTES)
    even = -(-tokens // max(1, chunks))
    return max(1, min(tokens, -(-even // _TILE) * _TILE))


def hidden_product(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = grad @ weight: a long sum, in float32 even where PyTorch lets cuBLAS split it into sums of 16 bits."""
    if grad.is_cuda and _HAS_WIDE_SUMS and grad.dtype in (torch.bfloat16, torch.float16):
        out.copy_(torch.mm(grad, weight, out_dtype=torch.float32))
    else:
        torch.mm(grad, weight, out=out)


def weight_product(grad: Tensor, hidden: Tensor, total: Tensor, add: bool) -> None:
    """total = grad.T @ hidden, added to what is there if `add`; `total` may be float32 for 16-bit factors."""
    beta = 1 if add else 0
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), hidden, beta=beta, out=total)
    elif grad.is_cuda and _HAS_WIDE_SUMS:
        torch.addmm(total, grad.t(), hidden, torch.float32, beta=beta, out=total)
    else:
        wide = hidden.float()
        for classes in slices(grad.shape[1], max(1, _BLOCK_BYTES // (4 * grad.shape[0]))):
            torch.addmm(total[classes], grad[:, classes].t().float(), wide, beta=beta, out=total[classes])


# ---- losses ----------------------------------------------------------------------------------------------------------


class _Sampler:
    """Collects what sampling keeps: places for each token, filled on the GPU."""

    def __init__(self, head: Head, task: Task, threshold: float, seed: Tensor) -> None:
        tokens, classes = head.hidden.shape[0], head.weight.shape[0]
        plain = task.target.dtype not in CODES and task.options.label_smoothing == 0.0
        self._slots = slots_of_token(threshold, classes, plain)
        self._threshold = threshold
        self._seed = seed.to(head.hidden.device, non_blocking=True)
        self.count = head.hidden.new_zeros(tokens, dtype=torch.int64)
        self.columns = head.hidden.new_full(
            (tokens, self._slots), classes, dtype=torch.int32
        )  # an empty place: behind all classes
        self.values = head.hidden.new_empty((tokens, self._slots), dtype=accumulation_dtype(head.hidden.dtype))

    def sample(self, call: tuple[Any, ...], saved: Tensor, numbers: Tensor, where: tuple[int, int]) -> None:
        """Keeps entries of a chunk whose tokens have these numbers."""
        places = (self._slots, *(part.data_ptr() for part in (self.count, self.columns, self.values)))
        random = (self._seed.data_ptr(), self._threshold, numbers.data_ptr())
        _cuda.sample_chunk(*call, saved.data_ptr(), random, places, *where)


def _call(logits: Tensor, task: Task, tokens: slice) -> tuple[Any, ...]:
    """The loss of a chunk as the kernels take it."""
    dim, ignore_index, label_smoothing, z_loss, softcap, temperature = task.options
    ids, soft = ops.targets_of(task.target[tokens], dim)
    transform = (temperature, softcap, ops.address(task.logit_bias))
    weight = ops.address(task.class_weight)
    return ops.describe(logits, dim), ids, soft, weight, transform, ignore_index, label_smoothing, z_loss


def _forward(
    head: Head, task: Task, reduction: int, denominator: float | None, wanted: Wanted, sampler: _Sampler | None
) -> tuple[Loss, list[Tensor]]:
    hidden, classes = head.hidden, head.weight.shape[0]
    check_ids(task.target, classes, task.options.ignore_index)
    order, task = _order(task)
    projection = Projection(*head, wanted, order)
    where, tokens = cuda.where(hidden), hidden.shape[0]
    sums = accumulation_dtype(hidden.dtype)
    # Zeros: what tokens have that come in no chunk.
    losses = hidden.new_zeros(tokens, dtype=sums if reduction == NONE else torch.float64)
    saved = hidden.new_zeros((tokens, 3), dtype=torch.float64)
    scale = hidden.new_empty((), dtype=torch.float64)
    loss = hidden.new_empty((), dtype=sums)
    numbers = order.tokens if order is not None else torch.arange(tokens if sampler else 0, device=hidden.device)

    def reduce(losses: Tensor | None) -> None:
        room = hidden.new_empty(_cuda.REDUCTION_BYTES, dtype=torch.uint8)
        ids = None if task.target.dtype in CODES else ops.ids_of(task.target)
        of_tokens = (tokens, classes, CODES[hidden.dtype], ids, ops.address(task.class_weight), task.options.ignore_index)
        out = (ops.address(losses), loss.data_ptr(), scale.data_ptr())
        _cuda.reduce_tokens(*of_tokens, reduction, denominator, *out, room.data_ptr(), *where)

    def kernel(chunk: slice, logits: Tensor) -> None:
        call, rows = _call(logits, task, chunk), saved[chunk]
        room = cuda.workspace(logits, task.options.dim, where)
        grad = ops.describe(logits, task.options.dim) if any(wanted) else None
        loss_of_tokens = (losses[chunk].data_ptr(), reduction != NONE)
        _cuda.cross_entropy_chunk(*call, scale.data_ptr(), *loss_of_tokens, rows.data_ptr(), grad, room.data_ptr(), *where)
        if sampler is not None:
            sampler.sample(call, rows, numbers[chunk], where)

    reduce(None)  # the gradients ask for the denominator before the losses are there
    for_each_chunk(projection, kernel, carry_back=any(wanted))
    if reduction != NONE:
        reduce(losses)
    else:
        loss = losses if order is None else order.undo(losses)
    return Loss(loss, saved if order is None else order.undo(saved), scale), projection.gradients()


def cross_entropy(
    head: Head, task: Task, reduction: int, denominator: float | None, wanted: Wanted
) -> tuple[Loss, list[Tensor]]:
    """As `linear_ops.cross_entropy`, with the factor of the gradient as a tensor."""
    return _forward(head, task, reduction, denominator, wanted, None)


def cross_entropy_backward(
    upstream: Tensor, head: Head, task: Task, saved: Tensor, scale: Tensor, wanted: Wanted
) -> list[Tensor]:
    """As `linear_ops.cross_entropy_backward`."""
    order, task = _order(task)
    projection = Projection(*head, wanted, order)
    by_token = upstream.ndim > 0
    if order is not None:
        saved = order.apply(saved)
        upstream = order.apply(upstream) if by_token else upstream

    def kernel(tokens: slice, logits: Tensor) -> None:
        of_tokens = upstream[tokens] if by_token else upstream
        rest = (*task[1:3], saved[tokens], scale, task.options)
        ops.cross_entropy_backward(of_tokens, logits, task.target[tokens], *rest, inplace=True)

    for_each_chunk(projection, kernel, carry_back=True)
    return projection.gradients()


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiplies in place, at no cost where the upstream gradient is 1."""
    of_loss = (upstream.data_ptr(), CODES[upstream.dtype], 0)
    for grad in filter(Tensor.numel, gradients):
        _cuda.scale(grad.data_ptr(), grad.numel(), CODES[grad.dtype], of_loss, *cuda.where(grad))


# ---- the sampled backward --------------------------------------------------------------------------------------------


def cross_entropy_sampled(
    head: Head, task: Task, reduction: int, denominator: float | None, threshold: float, seed: Tensor
) -> tuple[Loss, tuple[Tensor, Tensor, Tensor]]:
    """The loss, and of each token how many entries it kept, their columns and values: the first of its places."""
    sampler = _Sampler(head, task, threshold, seed)
    loss, _ = _forward(head, task, reduction, denominator, NOTHING, sampler)
    return loss, (sampler.count, sampler.columns, sampler.values)


def sampled_backward(
    upstream: Tensor, head: Head, entries: tuple[Tensor, Tensor, Tensor], scale: Tensor, wanted: Wanted
) -> list[Tensor]:
    """The gradients as sums over the kept entries, in a fixed order."""
    count, columns, values = entries
    hidden, weight = head.hidden.contiguous(), head.weight.contiguous()
    tokens, classes, code, where = len(hidden), len(weight), CODES[weight.dtype], cuda.where(hidden)
    factors = (upstream.to(torch.float64) * scale).expand(tokens).contiguous()
    places = (columns.shape[1], count.data_ptr(), columns.data_ptr(), values.data_ptr())
    by_hidden, by_weight, by_bias = (weight.new_empty(0) for _ in wanted)
    if wanted.hidden:
        by_hidden = torch.empty_like(hidden)
        matrix = (code, weight.data_ptr(), weight.shape[1])
        _cuda.multiply(tokens, places, factors.data_ptr(), 0, 0, *matrix, by_hidden.data_ptr(), *where)
    if wanted.weight or wanted.bias:
        # By classes, those of a class in the order of the tokens; empty places come last.
        sorted_columns, order = columns.flatten().sort(stable=True)
        start = torch.searchsorted(sorted_columns, torch.arange(classes + 1, dtype=torch.int32, device=columns.device))
        by_class = (classes, places, factors.data_ptr(), start.data_ptr(), order.data_ptr())
        if wanted.weight:
            by_weight = torch.empty_like(weight)
            _cuda.multiply(*by_class, code, hidden.data_ptr(), hidden.shape[1], by_weight.data_ptr(), *where)
        if wanted.bias:
            by_bias = weight.new_empty(classes)
            _cuda.row_sums(*by_class, code, by_bias.data_ptr(), *where)
    return [by_hidden, by_weight, by_bias]
