# SPDX-License-Identifier: Apache-2.0
"""Statistics of the rows of NumPy logits, in one trip over memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arrays, _cpu, _options
from fastloss._options import LogitStats


def logit_stats(
    logits: ArrayLike,
    target: ArrayLike | None = None,
    *,
    axis: int = -1,
    want: str | Iterable[str] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
) -> LogitStats:
    r"""Returns statistics of each row of logits from one trip over memory.

    With z = softcap * tanh(x / temperature / softcap) + bias, p = softmax(z) and L = log sum_j exp(z_j)::

        logprob     z_y - L               logsumexp     L
        entropy     L - sum_j p_j z_j     mean_logit    1/V sum_j z_j
        sum_sq_prob sum_j p_j^2           max_prob      max_j p_j
        argmax      of z, the first       rank          classes that a stable descending sort of z puts before y

    Args:
        logits: float32, float64, float16 or bfloat16 (of ml_dtypes), any strides; V classes on one axis.
        target: integers: one class id for each row, in the shape `rows` of the logits without the class axis, or K of
            them, in the shape rows + (K,).
        axis: the class axis.
        want: names of the statistics to compute, one or several; by default `logsumexp` and `entropy`, and `logprob`
            with a target.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits, positive.
        bias: (V,), added to the transformed logits.

    Returns:
        A `LogitStats`: in the fields asked for an array of shape `rows` (`logprob` and `rank`: the shape of `target`),
        None in all others. `argmax` and `rank` are int64; the others float64 for float64 logits and float32 for all
        others.

    Raises:
        TypeError: an argument has a dtype or type that has no meaning here.
        ValueError: an argument has a wrong shape or value, or a statistic is unknown or lacks its target.
        IndexError: a class id is not in [0, V).

    Example:
        >>> import fastloss, numpy as np
        >>> logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=np.float32))
        >>> stats = fastloss.logit_stats(logits, [2, 1], want=("max_prob", "argmax", "rank"))
        >>> print(np.round(stats.max_prob, 3), stats.argmax, stats.rank)
        [0.5 0.8] [0 1] [2 0]

    Source: Shannon, "A Mathematical Theory of Communication" (1948), for the entropy; the sum of squares is the
    quadratic term of Brier, "Verification of forecasts expressed in terms of probability" (1950).
    """
    transform = _options.transform_options(temperature, softcap)
    names = _options.wanted_statistics(want, target is not None)
    x = _arrays.floating(logits, "logits")
    axis = _options.class_axis(axis, x.shape, "axis", "logits")
    rows = _options.row_shape(x.shape, axis)
    biases = _arrays.per_class(bias, "bias", x, axis)
    y, ids, k = None, None, 0
    if target is not None:
        y = _arrays.plain(target, "target")
        if y.dtype.kind not in "iu":
            raise TypeError(f"target must hold integer class ids, got {y.dtype}")
        k = _options.ids_per_row(y.shape, x.shape, axis, "target", "logits")
        y = _arrays.class_ids(y)
        ids = (_arrays.address(y), y.itemsize)
    outputs = {
        name: np.empty(
            y.shape if y is not None and name in _options.TARGET_STATISTICS else rows,
            np.int64 if name in _options.INTEGER_STATISTICS else _arrays.accumulator_dtype(x),
        )
        for name in names
    }
    _cpu.statistics(
        _arrays.tensor(x, axis),
        ids,
        k,
        (*transform, _arrays.address(biases)),
        tuple(_arrays.address(outputs.get(name)) for name in _options.STATISTICS),
        0,
    )
    return LogitStats(**{name: output[()] for name, output in outputs.items()})
