# SPDX-License-Identifier: Apache-2.0
"""What the tests share: dtypes, rounding, the error bounds of the contract, and the rows that they are checked on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import reference

try:
    import ml_dtypes

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:  # the package is optional, and so are its arrays
    bfloat16 = None

DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "float16": np.dtype(np.float16)}
if bfloat16 is not None:
    DTYPES["bfloat16"] = bfloat16

LANES = 64  # virtual lanes of every sum, on every instruction set
BLOCK = 4096  # classes in a block
AWKWARD_LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 8 * LANES + 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 65)

# The size of one rounding error of the contract, and what may be flushed to zero, by accumulation type.
GRADIENT_UNIT = {"float32": 2.0**-22, "float64": 2.0**-51}
SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
LOSS_ULPS = 4
DEFAULT = reference.Options()


def accumulation(dtype):
    """The dtype in which losses of these logits are computed and returned."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def ulp(value, dtype):
    """The distance from |value| to the next larger number of the dtype, subnormals included."""
    dtype = np.dtype(dtype)
    if dtype == bfloat16:
        lowest, bits = -126, 7
    elif dtype == np.float16:
        lowest, bits = -14, 10
    elif dtype == np.float32:
        lowest, bits = -126, 23
    else:
        lowest, bits = -1022, 52
    _, exponent = np.frexp(np.abs(np.asarray(value, np.float64)))
    return np.ldexp(1.0, np.maximum(exponent - 1, lowest) - bits)


def assert_loss_close(actual, expected, dtype, slack=0.0):
    """Within a few ulp of the accumulation type (and `slack`); infinities and NaN must be the same."""
    assert np.asarray(actual).dtype == accumulation(dtype)
    actual = reference.wide(actual)
    with np.errstate(over="ignore"):  # what is beyond the largest number of the dtype is infinite in it
        largest = float(np.finfo(accumulation(dtype)).max)
        expected = np.where(np.abs(expected) > largest, np.copysign(np.inf, expected), expected)
    assert actual.shape == expected.shape
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(actual - expected))
    allowed = LOSS_ULPS * ulp(np.where(np.isfinite(expected), expected, 0), accumulation(dtype)) + slack
    ratio = np.where(np.isnan(error), np.inf, error / allowed)
    if np.any(ratio > 1):
        worst = np.argmax(ratio)
        raise AssertionError(
            f"{actual.flat[worst]!r} instead of {expected.flat[worst]!r}: {ratio.flat[worst]:.2f} of the bound; "
            f"{np.sum(ratio > 1)} of {ratio.size} wrong"
        )


def distance_of_the_others(log_p):
    """Where one class holds more than half of the probability: `sum_k p_k` and `sum_k p_k |log p_k|` over the other classes.

    1 - p of that class, and its loss, are sums over the others: they inherit the errors of those, each relative to its own
    `1 + |z_k - L|`. Zero in all other rows.
    """
    top = np.argmax(log_p, axis=-1)[:, None]
    others = np.where(np.isfinite(log_p), np.exp(log_p), 0)
    confident = np.take_along_axis(others, top, axis=-1) > 0.5
    np.put_along_axis(others, top, 0, axis=-1)
    others = np.where(confident, others, 0)
    distance = np.where(np.isfinite(log_p), np.abs(log_p), 0)
    return top, others.sum(axis=-1, keepdims=True), (others * distance).sum(axis=-1, keepdims=True)


def confident_slack(log_p, dtype):
    """What the loss of a confident row may be off, besides a few ulp; probabilities below the smallest normal number are 0."""
    _, rest, distance = distance_of_the_others(log_p)
    name = accumulation(dtype).name
    return (rest + distance)[:, 0] * GRADIENT_UNIT[name] + log_p.shape[-1] * SMALLEST_NORMAL[name]


def gradient_bound(expected, scale, log_p, dtype, extra=0.0, flushed=1.0):
    """(1 + |z_j - L| + extra) 2^-22 relative to `scale`; for 16-bit types half an ulp more, for the last rounding.

    For a class with more than half of the probability, |z_j - L| is the mean distance of the others: see above.

    `extra` stands for the rounding of z itself where there is a transform; `flushed` is the factor of the probabilities,
    of which those below the smallest normal number are 0.
    """
    name = accumulation(dtype).name
    distance = np.where(np.isfinite(log_p), np.abs(log_p), 0)
    top, rest, others = distance_of_the_others(log_p)
    at_top = np.maximum(np.take_along_axis(distance, top, axis=-1), others / np.where(rest > 0, rest, 1))
    np.put_along_axis(distance, top, at_top, axis=-1)
    bound = (1 + distance + extra) * GRADIENT_UNIT[name] * np.abs(scale) + np.abs(flushed) * SMALLEST_NORMAL[name]
    if np.dtype(dtype).itemsize == 2:
        bound = bound + 0.5 * ulp(np.abs(expected) + bound, dtype)
    return bound


def assert_gradient_close(actual, expected, scale, log_p, dtype, extra=0.0, flushed=1.0):
    """`actual` (in the dtype of the logits) within `gradient_bound` of `expected`; NaN must be the same."""
    assert np.asarray(actual).dtype == np.dtype(dtype)
    assert actual.shape == expected.shape
    actual = reference.wide(actual)
    both_nan = np.isnan(actual) & np.isnan(expected)
    with np.errstate(invalid="ignore"):
        error = np.where(both_nan, 0, np.abs(actual - expected))
        expected, scale = (np.where(both_nan, 0, x) for x in (expected, scale))
        bound = gradient_bound(expected, scale, log_p, dtype, extra, flushed)
    wrong = ~(error <= bound)
    if wrong.any():
        ratio = np.where(both_nan, 0, np.where(np.isnan(error), np.inf, error / bound))
        at = np.unravel_index(np.argmax(ratio), ratio.shape)
        raise AssertionError(
            f"gradient{list(map(int, at))} = {actual[at]} instead of {expected[at]}: {ratio[at]:.2f} of the bound; "
            f"{wrong.sum()} of {wrong.size} wrong"
        )


def transform_extra(logits, options):
    """How much the transform adds to `1 + |z_j - L|`: it rounds z itself, in proportion to |z|, and the slope."""
    if options.temperature == 1 and options.softcap is None and options.bias is None:
        return np.zeros((len(logits), 1))
    capped = reference.transform(logits, options.temperature, options.softcap)
    z = options.transformed(logits)
    magnitude = np.where(np.isfinite(z), np.maximum(np.abs(z), np.abs(capped)), 0)
    largest = np.max(magnitude, axis=-1, keepdims=True, initial=0)
    if options.softcap is None:
        return 2 * largest
    y = reference.wide(logits) / (options.temperature * options.softcap)
    return 2 * largest + 2 * np.where(np.isfinite(y), np.abs(y), 0)


def transform_slack(logits, target, options, reduction, denominator):
    """The same for the loss: the error of z times how much of it goes into each row loss."""
    extra = np.max(transform_extra(logits, options), axis=-1, initial=0)
    confident = confident_slack(reference.log_softmax(options.transformed(logits)), logits.dtype)
    if not np.any(extra) and not np.any(confident):
        return 0.0
    log_sum_exp = np.abs(reference.log_sum_exp(options.transformed(logits)))
    weight = np.max(np.abs(options.class_weights(logits.shape[-1])))
    mass = weight * (2 + 2 * options.z_loss * np.where(np.isfinite(log_sum_exp), log_sum_exp, 0))
    slack = extra * mass * GRADIENT_UNIT[accumulation(logits.dtype).name] + mass * np.where(
        np.isfinite(confident), confident, 0
    )
    scale = np.abs(reference.row_scale(target, logits.shape[-1], reduction, denominator, options))
    return slack if reduction == "none" else slack.sum() * scale


def assert_cross_entropy_contract(loss, gradient, logits, target, options=DEFAULT, reduction="mean", denominator=None):
    """Loss and gradient (None: not wanted) of a call against the oracle, on `[rows, classes]` logits."""
    arguments = (logits, target, options, reduction, denominator)
    assert_loss_close(loss, reference.cross_entropy(*arguments), logits.dtype, transform_slack(*arguments))
    if gradient is None:
        return
    factor = np.abs(reference.row_scale(target, logits.shape[-1], reduction, denominator, options))
    factor *= (1 + np.max(np.abs(options.class_weights(logits.shape[-1])))) * max(1.0, 1 / options.temperature)
    assert_gradient_close(
        gradient,
        reference.cross_entropy_gradient(*arguments),
        reference.cross_entropy_gradient_scale(*arguments),
        reference.log_softmax(options.transformed(logits)),
        logits.dtype,
        extra=transform_extra(logits, options),
        flushed=factor,
    )


def bits(array):
    """The bytes of an array, for comparisons in which -0 is not 0 and one NaN is not another."""
    return np.ascontiguousarray(array).tobytes()


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if bits(actual) != bits(expected):
        differ = np.flatnonzero(~((actual == expected) | ((actual != actual) & (expected != expected))).ravel())
        raise AssertionError(f"{len(differ)} of {actual.size} values differ, the first at {differ[:3]}")


def run_python(code, *arguments, timeout=120, **environment):
    """Runs code in a fresh interpreter that finds the same packages."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTLOSS_")}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *[p for p in sys.path if p]])
    env.update(environment)
    return subprocess.run(
        [sys.executable, *arguments, *(["-c", code] if code is not None else [])],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
