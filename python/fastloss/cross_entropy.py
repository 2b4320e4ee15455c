# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of NumPy arrays."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arrays, _cpu, _options
from fastloss._arrays import Array


@overload
def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
    denominator: float | None = None,
    return_grad: Literal[True],
) -> tuple[Any, Array]: ...
@overload
def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
    denominator: float | None = None,
    return_grad: bool = False,
) -> Any: ...
def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
    denominator: float | None = None,
    return_grad: bool = False,
) -> Any:
    r"""Returns the cross-entropy of logits and targets, and its gradient from the same trip over memory if wanted.

    With the transformed logits z = softcap * tanh(x / temperature / softcap) + bias and L = log sum_j exp(z_j), the loss
    of a row of V logits x with class id y, weights w and label smoothing eps is::

        w_y * ((1 - eps) * (L - z_y) + z_loss * L^2) + eps/V * sum_j w_j * (L - z_j)

    and 0 if y is `ignore_index`; with class probabilities q it is::

        sum_j w_j * ((1 - eps) * q_j + eps/V) * (L - z_j) + z_loss * L^2

    "mean" divides the sum of the rows by `denominator`, which is by default the sum of the weights of the counted
    targets, or the number of rows for class probabilities: NaN if nothing is counted.

    Args:
        logits: float32, float64, float16 or bfloat16 (of ml_dtypes), any strides; V classes on one axis.
        target: integers in the shape of the logits without the class axis, or floating-point class probabilities in
            the shape of the logits.
        weight: (V,), a weight for each class; ones by default.
        axis: the class axis; None is PyTorch's convention, 1, or 0 for one-dimensional logits; -1 serves
            [batch, time, vocab].
        ignore_index: class id of rows that do not count; not for probabilities, unless negative.
        reduction: "none", "mean" or "sum" over the rows.
        label_smoothing: eps, in [0, 1].
        z_loss: factor of the squared log-normaliser, at least 0.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits, positive.
        bias: (V,), added to the transformed logits (logit adjustment); a constant of the gradient.
        denominator: divides the sum, for reduction "mean": the token count of a whole accumulation window, say;
            positive.
        return_grad: returns the gradient of the loss (of its sum, for reduction "none") by the logits as well.

    Returns:
        The loss, float64 for float64 logits and float32 for all others: a scalar, or for reduction "none" an array in
        the shape of the logits without the class axis. With `return_grad` the pair (loss, gradient); the gradient has
        the shape and dtype of the logits.

    Raises:
        TypeError: an argument has a dtype or type that has no meaning here.
        ValueError: an argument has a wrong shape or value.
        IndexError: a class id is neither in [0, V) nor `ignore_index`.

    Example:
        >>> import fastloss, numpy as np
        >>> logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=np.float32))
        >>> loss, grad = fastloss.cross_entropy(logits, [0, 1], return_grad=True)
        >>> print(f"{loss:.4f}")
        0.4581
        >>> print(np.round(grad, 3))
        [[-0.25   0.125  0.125]
         [ 0.05  -0.1    0.05 ]]

    Source: label smoothing from Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016);
    z-loss from Chowdhery et al., "PaLM" (2022); softcap from "Gemma 2" (2024); logit adjustment from Menon et al.,
    "Long-tail learning via logit adjustment" (2021).
    """
    _options.check_flag("return_grad", return_grad)
    options = _options.loss_options(ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, denominator)
    x = _arrays.floating(logits, "logits")
    axis = _options.class_axis(axis, x.shape, "axis", "logits")
    y = _arrays.plain(target, "target")
    if y.dtype.kind in "iu":
        _options.check_ids_shape(y.shape, x.shape, axis, "axis", "logits")
        y = _arrays.class_ids(y)
    elif y.dtype.name in _arrays.DTYPE_CODES:
        y = _arrays.floating(y, "target")
        _options.check_probabilities_shape(y.shape, x.shape, "logits")
        _options.check_ignore_index_use(ignore_index)
    else:
        raise TypeError(f"target must hold integer class ids or floating-point class probabilities, got {y.dtype}")
    weights = _arrays.per_class(weight, "weight", x, axis)
    biases = _arrays.per_class(bias, "bias", x, axis)
    rows = _options.row_shape(x.shape, axis) if options.reduction == _options.NONE else ()
    loss = np.empty(rows, _arrays.accumulator_dtype(x))
    grad = _arrays.fresh(x) if return_grad else None
    _cpu.cross_entropy(
        _arrays.call_of(x, y, weights, biases, axis, options),
        options.reduction,
        options.denominator,
        _arrays.address(loss),
        0,
        None if grad is None else _arrays.tensor(grad, axis),
        1.0,
        None,
    )
    result = loss[()]  # a scalar where there are no dimensions, as NumPy's own reductions return
    return result if grad is None else (result, grad)
