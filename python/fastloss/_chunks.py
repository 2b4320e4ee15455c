# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy in chunks of tokens: how large they are, and the loop over them, for NumPy and PyTorch alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fastloss import _options

CHUNK_LOGITS = 1 << 26  # with many more the products gain nothing, with half of them a twentieth is lost


class Projection(Protocol):
    """Logits as a product of hidden states and weights, a chunk of tokens at a time."""

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk."""

    def logits(self, tokens: slice) -> Any:
        """The logits of a chunk, in memory that the next chunk overwrites."""

    def carry_back(self, tokens: slice, grad: Any) -> None:
        """Adds what a gradient by the logits of a chunk gives to the gradients by hidden states, weights and bias."""


def for_each_chunk(projection: Projection, kernel: Callable[[slice, Any], None], carry_back: bool) -> None:
    """Makes the logits of each chunk and lets the kernel see them, which turns them into gradients if they go back."""
    for tokens in projection.chunks():
        logits = projection.logits(tokens)
        kernel(tokens, logits)
        if carry_back:
            projection.carry_back(tokens, logits)


def chunk_size(wanted: int | None, tokens: int, classes: int, saved_by_one: int = 0) -> int:
    """Tokens of a chunk: the wanted number, or even chunks of about CHUNK_LOGITS logits.

    A single chunk may be larger by what it saves: the memory of `saved_by_one` logits.
    """
    if wanted is not None:
        return min(max(1, tokens), check_chunk_tokens(wanted))
    one = tokens * classes <= CHUNK_LOGITS + saved_by_one
    chunks = 1 if one else -(-tokens * classes // CHUNK_LOGITS)
    return max(1, -(-tokens // chunks))


def check_chunk_tokens(wanted: object) -> int:
    """Checks a number of tokens."""
    size = _options.index("chunk_tokens", wanted)
    if size < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {size}")
    return size


def slices(length: int, size: int) -> Iterator[slice]:
    """Cuts [0, length) into slices of `size`."""
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))
