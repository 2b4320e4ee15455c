# SPDX-License-Identifier: Apache-2.0
"""The matrix products of linear cross-entropy on a GPU: a chunk of tokens at a time, without those that are ignored.

How many tokens count is known to the GPU alone. Hidden states and gradients of those that do not are zeros, which weights of
inf or NaN turn into NaN. Once a call has ignored tokens, those that count are put first, in their order, and a call leaves the
rest out where the call before ignored some. Then the host waits for two numbers, neither of which costs the GPU more than the
start of a product: that of the call before, with all that has been queued since behind it, and its own, which is on its way
while the tokens are put in order. Where every token counts, the first is all that is waited for, and under graph capture
nothing. So results depend on the calls so far, never on how far the GPU has come. With a given size of chunks, tokens are put
in order in any case, and only whole chunks left out: as long as weights are finite, results do not depend on other calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastloss._chunks import check_chunk_tokens, slices
from fastloss.torch.ops import CPU, accumulation_dtype
from fastloss.torch.projection import NOTHING, Wanted

# Of the logits of a chunk, reckoned rather than measured. With W the bytes of a 16-bit gradient by the weights: several
# chunks add it up in float32, 2 W, which each of them reads and writes once more, and in the end W lies beside that, when
# the logits are gone. So logits of up to W take nothing from the peak of memory, and save traffic; and a single chunk,
# which needs no such sum, takes no more than several up to logits of 2 W. Elsewhere logits add to the peak, and a chunk
# needs only as many tokens as keep a product busy: 2093 in bfloat16 with 128256 classes.
CHUNK_BYTES = 1 << 29
_TILE = 128  # tokens: what a product takes at a time
_LINE = 128  # bytes: where rows of logits begin
_BLOCK_BYTES = 1 << 28  # of a product in float32 where cuBLAS cannot add to the sum itself

# Numbers of a product that cuBLAS has no reason to split into sums of 16 bits, as PyTorch lets it: the multiprocessors take a
# quarter of them at a time, 256 x 128 each.
_UNSPLIT = 1 << 24

# Products of 16-bit factors in float32, added to a float32 matrix: from this PyTorch on.
_HAS_WIDE_SUMS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 11)  # type: ignore[operator]


# ---- which tokens count ----------------------------------------------------------------------------------------------


class Count:
    """How many tokens of a call count: a number on its way from the GPU to the host."""

    def __init__(self, counts: Tensor) -> None:
        """Takes a bool for each token."""
        self._tokens = counts.numel()
        self._number = torch.empty((), dtype=torch.int64, device=CPU, pin_memory=True)
        self._number.copy_(counts.sum(), non_blocking=True)
        self._event = torch.cuda.current_stream(counts.device).record_event()

    def wait(self) -> int:
        """The number."""
        self._event.synchronize()
        return int(self._number)

    def is_all(self) -> bool:
        """Whether every token counts."""
        return self.wait() == self._tokens


_last: dict[torch.device, Count] = {}
_ignoring: set[torch.device] = set()  # where a call has ignored tokens, as far as the host knows


def _expected(counts: Tensor) -> tuple[bool, Count | None]:
    """Whether to reckon with ignored tokens, and the number of this call where the one before had some."""
    device = counts.device
    last = _last.get(device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return last is None or device in _ignoring, None
    _last[device] = count = Count(counts)
    if last is not None and not last.is_all():
        _ignoring.add(device)
        return True, count
    return last is None or device in _ignoring, None


class Order:
    """The tokens of a call, those that count first; in their own order as long as none was ever ignored."""

    def __init__(self, counts: Tensor, always: bool) -> None:
        """Takes a bool for each token; `always` puts those that count first whatever other calls did."""
        expected, self._count = _expected(counts)  # the GPU has the rest to do while the number is on its way
        self._ignored = ~counts
        self.tokens: Tensor | None = None  # their numbers, None in their own order
        if always or expected:
            self.tokens = self._ignored.to(torch.uint8).argsort(stable=True)
            self._ignored = self.apply(self._ignored)

    def apply(self, rows: Tensor) -> Tensor:
        """Rows in this order."""
        return rows if self.tokens is None else rows.index_select(0, self.tokens)

    def apply_to_hidden(self, hidden: Tensor) -> Tensor:
        """As `apply`, in memory of its own; zeros for ignored tokens, whose hidden states may hold anything."""
        ignored = self._ignored[:, None]
        return hidden.masked_fill(ignored, 0) if self.tokens is None else self.apply(hidden).masked_fill_(ignored, 0)

    def undo(self, rows: Tensor) -> Tensor:
        """Rows at the places of their tokens again."""
        return rows if self.tokens is None else torch.empty_like(rows).index_copy_(0, self.tokens, rows)

    def counted(self) -> int:
        """The first so many tokens hold all that count, as far as anybody asks."""
        return len(self._ignored) if self._count is None else self._count.wait()


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
        sums = accumulation_dtype(weight.dtype)
        counted = self._tokens if order is None else order.counted()
        rounded_bytes = weight.nbytes if wanted.weight and sums != weight.dtype else 0
        self._size = chunk_size(chunk_tokens, counted, classes * weight.element_size(), rounded_bytes)
        # Whole chunks: a product of fewer tokens may have other bits.
        self._end = min(self._tokens, -(-counted // self._size) * self._size)
        line = _LINE // weight.element_size()
        self._room = weight.new_empty((self._size, -(-classes // line) * line))[:, :classes]
        self._grad_hidden = torch.empty_like(self._hidden) if wanted.hidden else None
        if self._grad_hidden is not None:
            self._grad_hidden[self._end :].zero_()
        # Several chunks add up in the accumulation type; one is rounded by its product.
        at_once = self._size >= (self._end if chunk_tokens is None else self._tokens)
        of_weight = weight.dtype if at_once and weight.numel() >= _UNSPLIT else sums
        self._sum_weight = weight.new_empty(weight.shape, dtype=of_weight) if wanted.weight else None
        self._sum_bias = weight.new_zeros(classes, dtype=sums) if wanted.bias else None

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk, as long as some of them count."""
        return slices(self._end, self._size)

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
        """The gradients by hidden states, weight and bias; empty where they are not wanted. Called once, at the end."""
        del self._room  # whose memory the rounding may have
        by_hidden, by_weight, by_bias = (self._weight.new_empty(0) for _ in range(3))
        if self._grad_hidden is not None:
            by_hidden = self._grad_hidden if self._order is None else self._order.undo(self._grad_hidden)
        if self._sum_weight is not None:
            by_weight = (self._sum_weight if self._end else self._sum_weight.zero_()).to(self._weight.dtype)
        if self._sum_bias is not None:
            by_bias = self._sum_bias.to(self._weight.dtype)
        return [by_hidden, by_weight, by_bias]


def chunk_size(wanted: int | None, tokens: int, token_bytes: int, rounded_bytes: int) -> int:
    """Tokens of a chunk: the wanted number, or even chunks in whole tiles of a product.

    Of so many bytes a token; `rounded_bytes` has a 16-bit gradient by the weights, if one is made.
    """
    if wanted is not None:
        return min(max(1, tokens), check_chunk_tokens(wanted))
    logits_bytes = tokens * token_bytes
    chunks = 1 if logits_bytes <= 2 * rounded_bytes else -(-logits_bytes // max(CHUNK_BYTES, rounded_bytes))
    even = -(-tokens // max(1, chunks))
    return max(1, min(tokens, -(-even // _TILE) * _TILE))


def hidden_product(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = grad @ weight: a long sum, in float32 even where cuBLAS might split it."""
    may_split = out.numel() < _UNSPLIT and grad.dtype in (torch.bfloat16, torch.float16)
    if may_split and grad.is_cuda and _HAS_WIDE_SUMS:
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
