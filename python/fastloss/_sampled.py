# SPDX-License-Identifier: Apache-2.0
"""The sampled backward of linear cross-entropy: few entries of the gradient by the logits, and sums over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastloss import _cpu
from fastloss._arrays import Array, address


class SparseGradient(NamedTuple):
    """Kept entries in compressed rows: token i has columns[start[i] : start[i + 1]], in ascending order, and values."""

    start: Array
    columns: Array
    values: Array

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.start) - 1

    def scaled(self, factors: Array) -> SparseGradient:
        """Each row times a factor of its own, or all times one, in float64."""
        of_entries = factors if factors.ndim == 0 else np.repeat(factors, np.diff(self.start))
        values = np.multiply(self.values, of_entries, np.empty_like(self.values), dtype=np.float64, casting="same_kind")
        return self._replace(values=values)

    def transposed(self, rows: int) -> SparseGradient:
        """A row for each column; its entries stay in the order of the tokens."""
        out = SparseGradient(np.empty(rows + 1, np.int64), np.empty_like(self.columns), np.empty_like(self.values))
        wide = self.values.dtype == np.float64
        _cpu.transpose(self.rows, *self._addresses(), wide, rows, *out._addresses())
        return out

    def without_empty_rows(self) -> tuple[SparseGradient, Array]:
        """The rows that have an entry, and their numbers."""
        rows = np.flatnonzero(np.diff(self.start))
        return self._replace(start=np.append(self.start[rows], self.start[-1:])), rows

    def multiply(self, matrix: _cpu.Tensor, out: _cpu.Tensor) -> None:
        """Writes the product with a dense matrix, whose columns lie side by side: sums in the order of the entries."""
        _cpu.multiply(self.rows, *self._addresses(), matrix, out)

    def column_sums(self, columns: int) -> Array:
        """The sum of each column, float64."""
        return np.bincount(self.columns, self.values, columns)

    def _addresses(self) -> tuple[int, int, int]:
        return address(self.start), address(self.columns), address(self.values)


def slots_of_token(threshold: float, classes: int, plain: bool) -> int:
    """Places for the entries of a token where they must be set apart in advance.

    On average at most 1 / threshold entries are kept and the target's; 2 / threshold, unless the loss is that of class ids
    without label smoothing (`plain`). Entries are kept independently, so that the bound of Chernoff holds: with m of them on
    average, more than m + 10 sqrt(m) + 64 have a probability below 2e-22, whatever m.
    """
    mean = (1 if plain else 2) / threshold
    return min(classes, math.ceil(mean + 10 * math.sqrt(mean)) + 64)


class Sampler:
    """Collects what sampling keeps of each chunk of tokens."""

    def __init__(self, seed: int, threshold: float, values: type[np.floating] | np.dtype[np.floating]) -> None:
        """Random numbers depend on the seed, the token and the class alone."""
        self._seed, self._threshold, self._dtype = seed % 2**64, threshold, np.dtype(values)
        self._chunks: list[tuple[Array, _cpu.SampledGradient]] = []

    def start(self, tokens: Array) -> _cpu.SampledGradient:
        """Where the kernel puts the entries of a chunk, whose tokens have these numbers (int64)."""
        sampled = _cpu.SampledGradient(self._seed, self._threshold, address(tokens))
        self._chunks.append((tokens, sampled))
        return sampled

    def entries(self, tokens: int) -> SparseGradient:
        """All entries, with empty rows for tokens that were in no chunk."""
        total = sum(sampled.count() for _, sampled in self._chunks)
        lengths = np.zeros(tokens, np.int64)
        columns, values = np.empty(total, np.int32), np.empty(total, self._dtype)
        done = 0
        for numbers, sampled in self._chunks:
            start = np.empty(len(numbers) + 1, np.int64)
            sampled.collect(address(start), address(columns[done:]), address(values[done:]), self._dtype == np.float64)
            lengths[numbers] = np.diff(start)
            done += start[-1]
        return SparseGradient(np.concatenate([[0], np.cumsum(lengths)]), columns, values)
