# SPDX-License-Identifier: Apache-2.0
"""Logits as hidden @ weight.T + bias, a chunk of tokens at a time, and the gradients that go back through that product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss._chunks import chunk_size, slices
from fastloss.torch import matmul, ops
from fastloss.torch.ops import accumulation_dtype, fresh_matrix


class Wanted(NamedTuple):
    """Which gradients of a linear loss are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


class Projection:
    """Matrices of tokens: `hidden` is (N, H), `weight` (V, H), `bias` (V) or None.

    The gradients are those of the counted tokens: `kept` numbers the rows of `hidden` that take part, None stands for all.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor | None = None,
        chunk_tokens: int | None = None,
        wanted: Wanted = NOTHING,
    ) -> None:
        """Takes the factors, and drops the tokens that do not count."""
        self._all_tokens = hidden.shape[0]
        self._kept = kept
        self._hidden = hidden.contiguous() if kept is None else hidden.index_select(0, kept)
        self._weight, self._bias, self._wanted = weight, bias, wanted
        # Sums over chunks are those of the accumulation type, rounded with the last: one chunk needs none.
        sums = accumulation_dtype(weight.dtype)
        summed = wanted.weight and sums != weight.dtype
        of_sum = weight.numel() * sums.itemsize // weight.element_size() if summed else 0
        self._size = chunk_size(chunk_tokens, self.tokens, weight.shape[0], of_sum)
        self._room = fresh_matrix((self._size, weight.shape[0]), weight.dtype)
        self._grad_hidden = torch.empty_like(self._hidden) if wanted.hidden else None
        self._grad_weight = fresh_matrix(weight.shape, weight.dtype) if wanted.weight else None
        self._sum_weight = fresh_matrix(weight.shape, sums) if summed and self._size < self.tokens else None
        self._sum_bias = torch.zeros(weight.shape[0], dtype=sums, device=ops.CPU) if wanted.bias else None

    @property
    def tokens(self) -> int:
        """The number of tokens that count."""
        return self._hidden.shape[0]

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk."""
        return slices(self.tokens, self._size)

    def logits(self, tokens: slice) -> Tensor:
        """The logits of a chunk, in memory that the next chunk overwrites."""
        out = self._room[: tokens.stop - tokens.start]
        matmul.logits_product(self._hidden[tokens], self._weight, self._bias, out)
        return out

    def carry_back(self, tokens: slice, grad: Tensor) -> None:
        """Adds what a gradient by the logits of a chunk gives to the wanted gradients."""
        hidden = self._hidden[tokens]
        if self._grad_hidden is not None:
            matmul.hidden_product(grad, self._weight, self._grad_hidden[tokens])
        if self._grad_weight is not None:
            last = tokens.stop == self.tokens
            matmul.weight_product(grad, hidden, self._sum_weight, self._grad_weight, add=tokens.start > 0, last=last)
        if self._sum_bias is not None:
            matmul.add_rows(grad, self._sum_bias)

    def gradients(self) -> list[Tensor]:
        """The gradients by hidden states, weight and bias; empty where they are not wanted."""
        dtype = self._weight.dtype
        by_hidden, by_weight, by_bias = (self._weight.new_empty(0) for _ in range(3))
        if self._grad_hidden is not None:
            by_hidden = spread(self._grad_hidden, self._kept, self._all_tokens)
        if self._grad_weight is not None:
            by_weight = self._grad_weight if self.tokens else self._grad_weight.zero_()
        if self._sum_bias is not None:
            by_bias = self._sum_bias.to(dtype)
        return [by_hidden, by_weight, by_bias]


def spread(rows: Tensor, kept: Tensor | None, length: int) -> Tensor:
    """Rows of the counted tokens at their places among all tokens, zeros between them."""
    if kept is None:
        return rows
    out = rows.new_zeros((length, *rows.shape[1:]))
    return out.index_copy_(0, kept, rows)
