# SPDX-License-Identifier: Apache-2.0
"""The rules that arguments must obey, for the NumPy and the PyTorch functions alike.

Nothing here knows an array type: shapes are tuples of int, and messages name the argument as the caller wrote it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

Shape: TypeAlias = Sequence[int]


class LogitStats(NamedTuple):
    """Statistics of rows of logits: a field for each statistic, None for those that were not asked for.

    The fields hold NumPy arrays (`fastloss.logit_stats`) or PyTorch tensors (`fastloss.torch.logit_stats`), which is why
    they are typed Any. With p = softmax(z) of the transformed logits z:

    Attributes:
        logprob: log p_y of the targets, in the shape of `target`.
        logsumexp: L = log sum_j exp(z_j).
        entropy: H = -sum_j p_j log p_j.
        mean_logit: (1/V) sum_j z_j.
        sum_sq_prob: sum_j p_j^2.
        max_prob: max_j p_j.
        argmax: the first class that has the largest logit, int64; -1 in a row whose normaliser is NaN.
        rank: number of classes that a stable descending sort puts before the target, int64, in the shape of `target`;
            0 exactly where the target is the argmax; -1 in a row whose normaliser is NaN.
    """

    logprob: Any = None
    logsumexp: Any = None
    entropy: Any = None
    mean_logit: Any = None
    sum_sq_prob: Any = None
    max_prob: Any = None
    argmax: Any = None
    rank: Any = None


STATISTICS = LogitStats._fields
TARGET_STATISTICS = ("logprob", "rank")
INTEGER_STATISTICS = ("argmax", "rank")
NONE, MEAN, SUM = 0, 1, 2
RECYCLED_FROM = 1 << 22  # bytes, two huge pages: results from here on live in recycled memory
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


class LossOptions(NamedTuple):
    """The options of a cross-entropy, checked, as the kernels take them."""

    ignore_index: int
    reduction: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    temperature: float
    denominator: float | None


def loss_options(
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    z_loss: object,
    softcap: object,
    temperature: object,
    denominator: object,
) -> LossOptions:
    """Checks the options of a cross-entropy."""
    smoothing = number("label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {smoothing}")
    z_factor = number("z_loss", z_loss)
    if z_factor < 0.0:
        raise ValueError(f"z_loss must be at least 0, got {z_factor}")
    heat, cap = transform_options(temperature, softcap)
    divisor = None if denominator is None else check_denominator(denominator)
    if divisor is not None:
        check_denominator_use(reduction)
    return LossOptions(index("ignore_index", ignore_index), reduction_code(reduction), smoothing, z_factor, cap, heat, divisor)


def transform_options(temperature: object, softcap: object) -> tuple[float, float]:
    """Returns (temperature, softcap), with 0 for no softcap."""
    heat = number("temperature", temperature)
    if heat <= 0.0:
        raise ValueError(f"temperature must be positive, got {heat}")
    if softcap is None:
        return heat, 0.0
    cap = number("softcap", softcap)
    if cap <= 0.0:
        raise ValueError(f"softcap must be positive, or None for no softcap; got {cap}")
    return heat, cap


def backward_code(backward: object) -> bool:
    """Returns whether the backward of a linear loss is sampled."""
    if not isinstance(backward, str) or backward not in ("exact", "sampled"):
        raise ValueError(f"backward must be 'exact' or 'sampled', got {backward!r}")
    return backward == "sampled"


def threshold(value: object) -> float:
    """Returns the threshold of the sampled backward."""
    checked = number("threshold", value)
    if not 0.0 < checked <= 1.0:
        raise ValueError(f"threshold must be in (0, 1], got {checked}")
    return checked


def seed(value: object) -> int:
    """Returns a seed as a signed number of 64 bits; takes what torch.manual_seed takes."""
    checked = index("seed", value, 2**64)
    return checked - 2**64 if checked >= 2**63 else checked


def seed_of_place(seed: int, place: int) -> int:
    """Returns the seed of one of several heads: consecutive seeds share none of them."""
    return (seed + place * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63


def reduction_code(reduction: object) -> int:
    """Returns the code of the reduction."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, got {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return REDUCTIONS[reduction]


def check_denominator(value: object) -> float:
    """Returns the denominator of a mean."""
    divisor = number("denominator", value)
    if divisor <= 0.0:
        raise ValueError(f"denominator must be positive, got {divisor}")
    return divisor


def check_denominator_use(reduction: object) -> None:
    """A denominator belongs to the mean alone."""
    if reduction != "mean":
        raise ValueError(f"denominator goes with reduction='mean', got reduction={reduction!r}")


def check_flag(name: str, value: object) -> None:
    """Checks what is either on or off."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def number(name: str, value: object) -> float:
    """Returns a finite real number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        why = " that requires a gradient: it is a constant here" if getattr(value, "requires_grad", False) else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{why}")
    try:
        converted = float(value)
    except OverflowError:  # an int beyond all floats
        converted = math.inf
    if not -math.inf < converted < math.inf:
        raise ValueError(f"{name} must be finite, got {converted}")
    return converted


def index(name: str, value: object, end: int = 2**63) -> int:
    """Returns an integer that fits in 64 bits, with a sign unless `end` is 2**64."""
    try:
        if isinstance(value, bool) or (not isinstance(value, int) and _is_no_number(value)):
            raise TypeError
        converted = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= converted < end:
        raise ValueError(f"{name} must lie in [-2**63, 2**{end.bit_length() - 1}), got {converted}")
    return converted


def _is_no_number(value: Any) -> bool:
    """Of tensors and arrays: one of bools, or of one element along some dimension, which Python would take for a number."""
    return bool(getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")))


def class_axis(axis: object, shape: Shape, name: str, logits_name: str) -> int:
    """Returns the class axis, counted from the front. None is PyTorch's convention: 1, or 0 where there is one axis alone."""
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(f"{logits_name} must have a class axis, got a 0-dimensional one")
    if axis is None:
        chosen = 1 if ndim > 1 else 0
    else:
        chosen = index(name, axis)
        if not -ndim <= chosen < ndim:
            raise IndexError(f"{name} = {chosen} is out of range for {logits_name} of {ndim} dimensions")
        chosen %= ndim
    if shape[chosen] == 0:
        raise ValueError(
            f"{logits_name} must have at least one class, got shape {tuple(shape)} with classes along axis {chosen}"
        )
    return chosen


def row_shape(shape: Shape, axis: int) -> tuple[int, ...]:
    """Returns the shape without the class axis."""
    rows = list(shape)  # slices of a torch.Size are slow
    rows.pop(axis)  # which Dynamo of PyTorch 2.8 knows, unlike `del`
    return tuple(rows)


def check_ids_shape(target: Shape, logits: Shape, axis: int, name: str | None, logits_name: str) -> None:
    """Class ids have the shape of the rows. `name` is that of the argument for the class axis, if there is one."""
    if tuple(target) != row_shape(logits, axis):
        are_last = name is not None and tuple(target) == row_shape(logits, -1)
        raise ValueError(
            f"target of class ids must have shape {row_shape(logits, axis)} for {logits_name} of shape {tuple(logits)} "
            f"with classes along {name or 'axis'} {axis}, got {tuple(target)}"
            + (f": pass {name}=-1 for classes last" if are_last else "")
        )


def check_ignore_index_use(ignore_index: object) -> None:
    """Probabilities have no ids that could be ignored: negative ones, the default among them, ignore nothing."""
    if index("ignore_index", ignore_index) >= 0:
        raise ValueError(f"ignore_index has no meaning for target probabilities, got ignore_index={ignore_index}")


def check_probabilities_shape(target: Shape, logits: Shape, logits_name: str) -> None:
    """Probabilities have the shape of the logits."""
    if tuple(target) != tuple(logits):
        raise ValueError(
            f"target of floating-point probabilities must have the shape of {logits_name}, {tuple(logits)}, "
            f"got {tuple(target)}; class ids must be integers"
        )


def check_per_class(shape: Shape, classes: int, name: str) -> None:
    """Weights and biases are one number a class."""
    if tuple(shape) != (classes,):
        raise ValueError(f"{name} must have shape ({classes},), one number for each class, got {tuple(shape)}")


def ids_per_row(target: Shape, logits: Shape, axis: int, name: str, logits_name: str) -> int:
    """Returns K for ids of the shape of the rows and K at the end, 1 for ids of the shape of the rows."""
    rows = row_shape(logits, axis)
    if tuple(target) == rows:
        return 1
    if tuple(target[:-1]) == rows:
        return int(target[-1])
    many = ", ".join([*map(str, rows), "K"])
    raise ValueError(
        f"{name} must have shape {rows}, or ({many}) for K ids a row, for {logits_name} of shape {tuple(logits)}, "
        f"got {tuple(target)}"
    )


def wanted_statistics(want: object, has_target: bool) -> tuple[str, ...]:
    """Returns the names of the wanted statistics; by default logsumexp and entropy, and logprob with a target."""
    if want is None:
        return ("logprob", "logsumexp", "entropy") if has_target else ("logsumexp", "entropy")
    if not isinstance(want, Iterable):
        raise TypeError(f"want must be names of statistics, got {type(want).__name__}")
    names = (want,) if isinstance(want, str) else tuple(want)
    for name in names:
        if not isinstance(name, str) or name not in STATISTICS:
            raise ValueError(f"want must name statistics out of {', '.join(STATISTICS)}; got {name!r}")
        if name in TARGET_STATISTICS and not has_target:
            raise ValueError(f"want={name!r} needs a target")
    return names
