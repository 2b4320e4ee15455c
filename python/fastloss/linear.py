# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy and statistics of NumPy arrays: hidden states and weights in, logits never stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arrays, _chunks, _cpu, _options
from fastloss._arrays import Array
from fastloss._options import LogitStats
from fastloss._sampled import Sampler, SparseGradient
from fastloss.stats import logit_stats

Gradients: TypeAlias = tuple[Array, Array, Array | None]


def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_bias: ArrayLike | None = None,
    denominator: float | None = None,
    return_grad: bool = False,
    backward: str = "exact",
    threshold: float = 1 / 64,
    seed: int | np.random.Generator | None = None,
    chunk_tokens: int | None = None,
) -> Any:
    r"""Returns `cross_entropy(hidden @ weight.T + bias, target)`, and its gradients, with the logits of few tokens at a time.

    The loss is that of `cross_entropy`. Tokens with the ignored id are left out before the first product. With float16 and
    bfloat16 arrays logits and sums are float32, and gradients are rounded once.

    With ``backward="sampled"`` few entries of each token's gradient by its logits are kept, at random and without bias: with
    u uniform in (0, 1], t the threshold and s the factor of the token's probabilities (1 / temperature for a plain
    cross-entropy), c_j is kept if ``abs(c_j) > u * t * s``, as ``sign(c_j) * max(abs(c_j), t * s)``; the target's entry
    always, as it is. The expectation of an entry is c_j and its variance at most ``t * s * abs(c_j)``; about 1/t entries of a
    token are kept, and the two products of the backward become short sums. Where a z-loss leaves s smaller than what label
    smoothing or probabilities add to the entries besides the target's, s is the mean of both. The loss stays exact.

    Args:
        hidden: (..., H), hidden states; float32, float64, float16 or bfloat16 (of ml_dtypes).
        weight: (V, H), of the dtype of `hidden`.
        target: integers (...), or floating-point class probabilities (..., V).
        bias: (V,), part of the linear map.
        class_weight: (V,), a weight for each class; ones by default.
        ignore_index: class id of tokens that do not count; not for probabilities, unless negative.
        reduction: "none", "mean" or "sum" over the tokens.
        label_smoothing: eps, in [0, 1].
        z_loss: factor of the squared log-normaliser, at least 0.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits, positive.
        logit_bias: (V,), added to the transformed logits; a constant of the gradient.
        denominator: divides the sum, for reduction "mean"; positive.
        return_grad: returns the gradients of the loss (of its sum, for reduction "none") as well.
        backward: "exact" or "sampled".
        threshold: t in (0, 1], for the sampled backward.
        seed: an int from -2**63 to 2**64 - 1, a NumPy generator, or None for fresh random numbers, for the sampled backward.
        chunk_tokens: tokens whose logits are made at a time; by default as many as have 2**26 logits.

    Returns:
        The loss, float64 for float64 arrays and float32 for all others: a scalar, or for reduction "none" an array of shape
        (...). With `return_grad` the pair (loss, (dhidden, dweight, dbias)), dbias None without a bias.

    Raises:
        TypeError: an argument has a dtype or type that has no meaning here.
        ValueError: an argument has a wrong shape or value.
        IndexError: a class id is neither in [0, V) nor `ignore_index`.

    Example:
        >>> import fastloss, numpy as np
        >>> hidden, weight = np.eye(2, dtype=np.float32), np.array([[1, 0], [0, 1], [0, 0]], np.float32)
        >>> loss, (dhidden, dweight, dbias) = fastloss.linear_cross_entropy(hidden, weight, [0, 1], return_grad=True)
        >>> print(f"{loss:.4f}", dhidden.shape, dweight.shape, dbias)
        0.5514 (2, 2) (3, 2) None

    Source: the sampling rule from Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed
    Optimization" (2018).
    """
    _options.check_flag("return_grad", return_grad)
    options = _options.loss_options(ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, denominator)
    sampled, least = _options.backward_code(backward), _options.threshold(threshold)
    if seed is not None and not isinstance(seed, np.random.Generator):
        seed = _options.seed(seed)
    factors = _Factors(hidden, weight, bias)
    y = _arrays.plain(target, "target")
    kept: Array | None = None
    if y.dtype.kind in "iu":
        _options.check_ids_shape(y.shape, factors.logits_shape, len(factors.rows), None, "the logits")
        y = _arrays.class_ids(y)
        _cpu.check_targets((_arrays.address(y), y.itemsize), y.shape, factors.classes, options.ignore_index)
        y = y.reshape(-1)
        counts = y != options.ignore_index
        kept = None if counts.all() else np.flatnonzero(counts)
        y = y if kept is None else y[kept]
    elif y.dtype.name in _arrays.DTYPE_CODES:
        _options.check_probabilities_shape(y.shape, factors.logits_shape, "the logits")
        _options.check_ignore_index_use(ignore_index)
        y = np.ascontiguousarray(_arrays.floating(y, "target")).reshape(-1, factors.classes)
    else:
        raise TypeError(f"target must hold integer class ids or floating-point class probabilities, got {y.dtype}")
    weights = _arrays.per_class(class_weight, "class_weight", factors.weight, 0)
    biases = _arrays.per_class(logit_bias, "logit_bias", factors.weight, 0)
    projection = _Projection(factors, kept, chunk_tokens, carry_back=return_grad and not sampled)
    divisor = 1.0
    if options.denominator is not None:
        divisor = options.denominator
    elif options.reduction == _options.MEAN:
        divisor = len(y) if weights is None or y.ndim == 2 else weights[y].sum(dtype=np.float64)
    losses = np.empty(projection.tokens, factors.dtype)
    sampler = Sampler(_drawn(seed), least, factors.dtype) if return_grad and sampled else None
    numbers = np.arange(factors.tokens) if kept is None else kept

    def kernel(tokens: slice, logits: Array) -> None:
        _cpu.cross_entropy(
            _arrays.call_of(logits, y[tokens], weights, biases, 1, options),
            _options.NONE,
            None if sampler else divisor or np.inf,  # nothing counted: no gradient
            _arrays.address(losses[tokens]),
            0,
            _arrays.tensor(logits, 1) if return_grad and sampler is None else None,
            1.0,
            sampler.start(numbers[tokens]) if sampler else None,
        )

    _chunks.for_each_chunk(projection, kernel, carry_back=return_grad and sampler is None)
    loss = _reduced(losses, kept, factors, options, divisor)
    if not return_grad:
        return loss
    if sampler:
        entries = sampler.entries(factors.tokens).scaled(np.array(1.0 / divisor if divisor else 0.0))
        return loss, _sampled_gradients(entries, factors)
    return loss, projection.gradients()


def linear_logit_stats(
    hidden: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    want: str | Iterable[str] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_bias: ArrayLike | None = None,
    chunk_tokens: int | None = None,
) -> LogitStats:
    """Returns `logit_stats(hidden @ weight.T + bias, target)` with the logits of a few tokens at a time.

    Args:
        hidden: (..., H), hidden states; float32, float64, float16 or bfloat16 (of ml_dtypes).
        weight: (V, H), of the dtype of `hidden`.
        target: integers: one class id for each token, (...), or K of them, (..., K).
        bias: (V,), part of the linear map.
        want: names of the statistics, see `logit_stats`.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits, positive.
        logit_bias: (V,), added to the transformed logits.
        chunk_tokens: tokens whose logits are made at a time; by default as many as have 2**26 logits.

    Returns:
        A `LogitStats` as `logit_stats` returns it.

    Raises:
        TypeError: an argument has a dtype or type that has no meaning here.
        ValueError: an argument has a wrong shape or value, or a statistic is unknown or lacks its target.
        IndexError: a class id is not in [0, V).

    Example:
        >>> import fastloss, numpy as np
        >>> hidden, weight = np.zeros((2, 3), np.float32), np.zeros((8, 3), np.float32)
        >>> stats = fastloss.linear_logit_stats(hidden, weight, [3, 5], want=("logprob", "entropy"))
        >>> print(np.exp(stats.logprob), np.exp(stats.entropy))
        [0.125 0.125] [8. 8.]

    Source: that of the statistics, see `logit_stats`.
    """
    _options.transform_options(temperature, softcap)
    names = _options.wanted_statistics(want, target is not None)
    factors = _Factors(hidden, weight, bias)
    biases = _arrays.per_class(logit_bias, "logit_bias", factors.weight, 0)
    ids: Array | None = None
    if target is not None:
        ids = _arrays.plain(target, "target")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"target must hold integer class ids, got {ids.dtype}")
        k = _options.ids_per_row(ids.shape, factors.logits_shape, len(factors.rows), "target", "the logits")
        ids = _arrays.class_ids(ids)
        _cpu.check_targets((_arrays.address(ids), ids.itemsize), ids.shape, factors.classes, None)
        ids = ids.reshape(factors.tokens, *((k,) if ids.ndim > len(factors.rows) else ()))
    projection = _Projection(factors, None, chunk_tokens, carry_back=False)
    chunks: list[LogitStats] = []

    def kernel(tokens: slice, logits: Array) -> None:
        part = None if ids is None else ids[tokens]
        transform = {"softcap": softcap, "temperature": temperature, "bias": biases}
        chunks.append(logit_stats(logits, part, want=names, **transform))  # type: ignore[arg-type]

    _chunks.for_each_chunk(projection, kernel, carry_back=False)
    if not chunks:
        chunks.append(logit_stats(np.empty((0, factors.classes), factors.dtype), ids, want=names))
    found: dict[str, Any] = {}
    for name in names:
        whole = np.concatenate([getattr(chunk, name) for chunk in chunks])
        found[name] = whole.reshape(factors.rows + whole.shape[1:])[()]
    return LogitStats(**found)


class _Factors:
    """Hidden states and weight as matrices, in the dtype in which the caller has them, and the bias in that of sums."""

    def __init__(self, hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> None:
        """Checks them."""
        h, w = _arrays.floating(hidden, "hidden"), _arrays.floating(weight, "weight")
        if h.ndim < 1:
            raise ValueError("hidden must have shape (..., H), got a 0-dimensional array")
        if h.shape[-1] == 0:
            raise ValueError(f"hidden must have at least one feature, got shape {h.shape}")
        if w.ndim != 2 or w.shape[1] != h.shape[-1]:
            raise ValueError(f"weight must have shape (V, {h.shape[-1]}) for hidden of shape {h.shape}, got {w.shape}")
        if w.shape[0] == 0:
            raise ValueError(f"weight must have at least one class, got shape {w.shape}")
        if w.dtype != h.dtype:
            raise TypeError(f"weight must have the dtype of hidden, {h.dtype}, got {w.dtype}")
        self.dtype = _arrays.accumulator_dtype(h)
        self.rows = h.shape[:-1]
        self.classes = w.shape[0]
        self.logits_shape = (*self.rows, self.classes)
        self.hidden = h.reshape(-1, h.shape[-1])
        self.weight = w
        self.bias = _arrays.per_class(bias, "bias", w, 0)
        self.tokens = len(self.hidden)


class _Projection:
    """Logits a chunk at a time, and the gradients that go back through the product; see `_chunks.Projection`."""

    def __init__(self, factors: _Factors, kept: Array | None, chunk_tokens: int | None, carry_back: bool) -> None:
        self._factors, self._kept = factors, kept
        self._hidden = np.ascontiguousarray(factors.hidden if kept is None else factors.hidden[kept], factors.dtype)
        self.tokens = len(self._hidden)
        self._size = _chunks.chunk_size(chunk_tokens, self.tokens, factors.classes)
        self._room = _arrays.fresh_matrix((self._size, factors.classes), factors.dtype)
        if carry_back:
            self._grad_hidden = np.empty_like(self._hidden)
            self._grad_weight = _arrays.fresh_matrix(factors.weight.shape, factors.dtype)
            self._grad_bias = np.zeros(factors.classes, factors.dtype)

    def chunks(self) -> Iterator[slice]:
        return _chunks.slices(self.tokens, self._size)

    def logits(self, tokens: slice) -> Array:
        out = self._room[: tokens.stop - tokens.start]
        factors = _arrays.tensor(self._hidden[tokens], 1), _arrays.tensor(self._factors.weight, 1)
        _cpu.ordered_product(*factors, _arrays.address(self._factors.bias), _arrays.tensor(out, 1))
        return out

    def carry_back(self, tokens: slice, grad: Array) -> None:
        factors = _arrays.tensor(grad, 1), _arrays.tensor(self._factors.weight, 1)
        _cpu.product(*factors, _arrays.tensor(self._grad_hidden[tokens], 1))
        _add_product(grad.T, self._hidden[tokens], self._grad_weight, add=tokens.start > 0)
        if self._factors.bias is not None:
            _add_product(np.ones((1, len(grad)), grad.dtype), grad, self._grad_bias[None], add=True)

    def gradients(self) -> Gradients:
        if self.tokens == 0:
            self._grad_weight.fill(0)
        by_hidden = self._grad_hidden
        if self._kept is not None:
            by_hidden = np.zeros(self._factors.hidden.shape, self._factors.dtype)
            by_hidden[self._kept] = self._grad_hidden
        return _as_written(by_hidden, self._grad_weight, self._grad_bias, self._factors)


def _add_product(left: Array, right: Array, out: Array, *, add: bool) -> None:
    _cpu.add_product(_arrays.tensor(left, 1), _arrays.tensor(right, 1), add, _arrays.tensor(out, 1))


def _reduced(losses: Array, kept: Array | None, factors: _Factors, options: _options.LossOptions, divisor: float) -> Any:
    if options.reduction == _options.NONE:
        if kept is not None:
            spread = np.zeros(factors.tokens, losses.dtype)
            spread[kept] = losses
            losses = spread
        return losses.reshape(factors.rows)[()]
    if divisor == 0.0:  # the mean of nothing
        return losses.dtype.type(np.nan)
    return losses.dtype.type(losses.sum(dtype=np.float64) / divisor)


def _sampled_gradients(entries: SparseGradient, factors: _Factors) -> Gradients:
    hidden, weight = np.ascontiguousarray(factors.hidden), np.ascontiguousarray(factors.weight)
    by_hidden, by_weight = np.empty_like(hidden), _arrays.fresh_matrix(weight.shape, weight.dtype)
    entries.multiply(_arrays.tensor(weight, 1), _arrays.tensor(by_hidden, 1))
    entries.transposed(factors.classes).multiply(_arrays.tensor(hidden, 1), _arrays.tensor(by_weight, 1))
    return _as_written(by_hidden, by_weight, entries.column_sums(factors.classes), factors)


def _as_written(by_hidden: Array, by_weight: Array, by_bias: Array, factors: _Factors) -> Gradients:
    """In the shapes and the dtype of the arguments."""
    storage = factors.weight.dtype
    return (
        by_hidden.reshape(*factors.rows, by_hidden.shape[1]).astype(storage, copy=False),
        by_weight.astype(storage, copy=False),
        None if factors.bias is None else by_bias.astype(storage, copy=False),
    )


def _drawn(seed: int | np.random.Generator | None) -> int:
    return seed if isinstance(seed, int) else int(np.random.default_rng(seed).integers(2**63))
