# SPDX-License-Identifier: Apache-2.0
"""The matrix products of linear cross-entropy on a GPU: a chunk of tokens at a time, those that count first.

How many tokens count is known to the GPU alone. So the tokens that count are put first, in their order, and the rest takes part
with gradients of zero: the same bits wherever the work ends, and it may end after any chunk behind which no token counts. Where
the last call ignored tokens, this one asks for its number, but only after its first chunk is on the way, which keeps the GPU
busy meanwhile; else the host never waits. A call of one chunk has nothing to leave out, and under graph capture nothing is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastloss._chunks import check_chunk_tokens, slices
from fastloss.torch.ops import CPU, accumulation_dtype
from fastloss.torch.projection import NOTHING, Wanted

CHUNK_BYTES = 1 << 30  # of logits: each chunk reads and writes the float32 sum by the weights once more
_TILE = 128  # tokens: what a product takes at a time
_LINE = 128  # bytes: where rows of logits begin
_BLOCK_BYTES = 1 << 28  # of a product in float32 where cuBLAS cannot add to the sum itself

# Sums of 16-bit factors in float32, added to a float32 matrix: from this PyTorch on.
_HAS_WIDE_SUMS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 10)  # type: ignore[operator]


# ---- which tokens count ----------------------------------------------------------------------------------------------


class Count:
    """How many tokens of a call count: a number on its way from the GPU to the host."""

    def __init__(self, counts: Tensor) -> None:
        """Takes a bool for each token."""
        self._tokens = counts.numel()
        self._number = torch.empty((), dtype=torch.int64, device=CPU, pin_memory=True)
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
