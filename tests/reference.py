# SPDX-License-Identifier: Apache-2.0
"""The oracle: every formula of fastloss in plain NumPy, one readable function each.

Logits are `[rows, classes]` here. Every function works one precision wider than the accumulation of the kernels: in
float64 for float32, float16 and bfloat16 logits, in `numpy.longdouble` for float64 ones. Nothing is taken from `z` that
can be taken from `z - max`, and nothing from `1 - p` that can be summed, so that the oracle keeps its digits on
confident rows and at large offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED = -100


def wide(array):
    """The array in the precision of the oracle."""
    array = np.asarray(array)
    return array.astype(np.longdouble if array.dtype in (np.float64, np.longdouble) else np.float64)


def as_rows(array, axis):
    """`[rows, classes]`, rows in C order of the other axes."""
    moved = np.moveaxis(np.asarray(array), axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def from_rows(rows, shape, axis):
    """The inverse of `as_rows` for an array of this shape."""
    moved_shape = np.moveaxis(np.empty(shape, np.bool_), axis, -1).shape
    return np.moveaxis(rows.reshape(moved_shape), -1, axis)


def products(factor, value):
    """factor * value, where a factor of zero counts nothing, whatever the value."""
    with np.errstate(invalid="ignore"):
        return np.where(factor == 0, 0, factor * value)


# ---- the transform ----


def transform(logits, temperature=1.0, softcap=None, bias=None):
    """z = softcap * tanh(x / temperature / softcap) + bias"""
    z = wide(logits) / temperature
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    return z if bias is None else z + wide(bias)


def transform_slope(logits, temperature=1.0, softcap=None):
    """dz / dx = (1 - tanh(x / temperature / softcap)^2) / temperature, written with cosh, which does not cancel."""
    x = wide(logits)
    if softcap is None:
        return np.full_like(x, 1 / temperature)
    with np.errstate(over="ignore"):
        return 1 / (temperature * np.cosh(x / (temperature * softcap)) ** 2)


# ---- the normaliser ----


class Normaliser(NamedTuple):
    """sum_j exp(z_j - max) = 1 + rest, where `rest` is summed without the first class of the maximum."""

    max: np.ndarray
    rest: np.ndarray


def normaliser(z):
    top = z.max(axis=-1)
    with np.errstate(invalid="ignore"):
        e = np.exp(z - top[:, None])
    np.put_along_axis(e, argmax_of(z)[:, None], np.where(np.isnan(e).any(axis=-1), np.nan, 0)[:, None], axis=-1)
    return Normaliser(top, e.sum(axis=-1))


def argmax_of(z):
    return np.argmax(z, axis=-1)


def shifted(z):
    """x = z - max"""
    with np.errstate(invalid="ignore"):
        return z - z.max(axis=-1, keepdims=True)


def log_softmax(z):
    return shifted(z) - np.log1p(normaliser(z).rest)[:, None]


def softmax(z):
    with np.errstate(invalid="ignore"):
        return np.exp(shifted(z)) / (1 + normaliser(z).rest)[:, None]


def softmax_minus_one_hot(z, target):
    """p_j - [j = y]; the target's entry is minus the sum of the others, which does not cancel."""
    p = softmax(z)
    others = p.copy()
    np.put_along_axis(others, target[:, None], 0, axis=-1)
    np.put_along_axis(p, target[:, None], -others.sum(axis=-1)[:, None], axis=-1)
    # A row without a normaliser is NaN as a whole.
    p[np.isnan(normaliser(z).rest)] = np.nan
    return p


# ---- cross-entropy ----


class Options(NamedTuple):
    weight: np.ndarray | None = None
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    softcap: float | None = None
    bias: np.ndarray | None = None

    def transformed(self, logits):
        return transform(logits, self.temperature, self.softcap, self.bias)

    def slope(self, logits):
        return transform_slope(logits, self.temperature, self.softcap)

    def class_weights(self, classes):
        return np.ones(classes) if self.weight is None else wide(self.weight)


DEFAULT = Options()


def cross_entropy_of_ids(logits, target, options=DEFAULT):
    """w_y ((1 - eps) (L - z_y) + z_loss L^2) + eps / V sum_j w_j (L - z_j), and 0 for ignored rows"""
    z = options.transformed(logits)
    classes = z.shape[-1]
    counted, y = counted_and_safe(target, options)
    w = options.class_weights(classes)
    minus_log_p = -log_softmax(z)
    loss = products(w[y] * (1 - options.label_smoothing), np.take_along_axis(minus_log_p, y[:, None], axis=-1)[:, 0])
    loss = loss + products(w[y] * options.z_loss, log_sum_exp(z) ** 2)
    if options.label_smoothing:
        loss = loss + options.label_smoothing / classes * products(w, minus_log_p).sum(axis=-1)
    return np.where(counted, loss, 0)


def cross_entropy_of_soft_target(logits, target, options=DEFAULT):
    """sum_j w_j ((1 - eps) q_j + eps / V) (L - z_j) + z_loss L^2"""
    z = options.transformed(logits)
    loss = products(soft_mass(z, target, options), -log_softmax(z)).sum(axis=-1)
    return loss + products(options.z_loss, log_sum_exp(z) ** 2)


def soft_mass(z, target, options):
    """w_j ((1 - eps) q_j + eps / V)"""
    classes = z.shape[-1]
    smoothed = (1 - options.label_smoothing) * wide(target) + options.label_smoothing / classes
    return options.class_weights(classes) * smoothed


def counted_and_safe(target, options):
    target = np.asarray(target).astype(np.int64)
    counted = target != options.ignore_index
    return counted, np.where(counted, target, 0)


def is_soft(target):
    return not np.issubdtype(np.asarray(target).dtype, np.integer)


def cross_entropy_rows(logits, target, options=DEFAULT):
    return (cross_entropy_of_soft_target if is_soft(target) else cross_entropy_of_ids)(logits, target, options)


def mean_denominator(target, classes, options=DEFAULT):
    """The sum of the weights of the counted targets; the number of rows for soft targets."""
    if is_soft(target):
        return float(len(target))
    counted, y = counted_and_safe(target, options)
    return options.class_weights(classes)[y[counted]].sum()


def row_scale(target, classes, reduction, denominator, options):
    """What a row loss is multiplied by on its way into the loss."""
    if reduction != "mean":
        return 1.0
    if denominator is None and not is_soft(target) and not counted_and_safe(target, options)[0].any():
        return 0.0  # nothing is counted: the loss is NaN, and the gradient zero
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.float64(1.0) / (mean_denominator(target, classes, options) if denominator is None else denominator)


def cross_entropy(logits, target, options=DEFAULT, reduction="mean", denominator=None):
    rows = cross_entropy_rows(logits, target, options)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if denominator is None:
        denominator = mean_denominator(target, logits.shape[-1], options)
    with np.errstate(divide="ignore", invalid="ignore"):
        return rows.sum() / np.float64(denominator)


def cross_entropy_gradient_terms(logits, target, options=DEFAULT):
    """The terms whose sum is the gradient of each row loss; rounding errors are relative to their magnitudes."""
    z = options.transformed(logits)
    classes = z.shape[-1]
    p = softmax(z)
    w = options.class_weights(classes)
    if is_soft(target):
        mass = soft_mass(z, target, options)
        terms = [mass.sum(axis=-1)[:, None] * p, -mass, 2 * options.z_loss * log_sum_exp(z)[:, None] * p]
        counted = np.ones(len(z), np.bool_)
    else:
        counted, y = counted_and_safe(target, options)
        share = options.label_smoothing / classes
        terms = [(w[y] * (1 - options.label_smoothing))[:, None] * softmax_minus_one_hot(z, y)]
        if options.label_smoothing:
            terms += [share * w.sum() * p, -share * np.broadcast_to(w, p.shape)]
        if options.z_loss:
            terms += [(2 * w[y] * options.z_loss * log_sum_exp(z))[:, None] * p]
    slope = options.slope(logits)
    return [np.where(counted[:, None], term * slope, 0) for term in terms]


def cross_entropy_gradient(logits, target, options=DEFAULT, reduction="mean", denominator=None, upstream=1.0):
    """The gradient of `upstream * loss` by the logits; upstream is one number, or one a row for "none"."""
    terms = cross_entropy_gradient_terms(logits, target, options)
    scale = row_scale(target, logits.shape[-1], reduction, denominator, options)
    return sum(terms) * (np.asarray(upstream) * scale * np.ones(len(logits)))[:, None]


def cross_entropy_gradient_scale(logits, target, options=DEFAULT, reduction="mean", denominator=None, upstream=1.0):
    """The sum of the magnitudes of the terms: what rounding errors of the gradient are relative to."""
    terms = cross_entropy_gradient_terms(logits, target, options)
    scale = row_scale(target, logits.shape[-1], reduction, denominator, options)
    return sum(abs(term) for term in terms) * abs(np.asarray(upstream) * scale * np.ones(len(logits)))[:, None]


def soft_target_gradient(logits, target, options=DEFAULT, reduction="mean", denominator=None, upstream=1.0):
    """The gradient of the loss by its soft targets: u_i (1 - eps) w_j (L_i - z_ij)"""
    z = options.transformed(logits)
    scale = row_scale(target, z.shape[-1], reduction, denominator, options)
    u = np.asarray(upstream) * scale * np.ones(len(z))
    w = options.class_weights(z.shape[-1])
    return u[:, None] * products((1 - options.label_smoothing) * w, -log_softmax(z))


# ---- statistics ----


def log_prob(z, ids):
    """log p of K ids a row: [rows, K]"""
    return np.take_along_axis(log_softmax(z), ids, axis=-1)


def log_sum_exp(z):
    top, rest = normaliser(z)
    return top + np.log1p(rest)


def entropy(z):
    """-sum p log p"""
    return -products(softmax(z), log_softmax(z)).sum(axis=-1)


def mean_logit(z):
    return z.mean(axis=-1)


def sum_sq_prob(z):
    return (softmax(z) ** 2).sum(axis=-1)


def max_prob(z):
    return 1 / (1 + normaliser(z).rest)


def argmax(z):
    """The first class of the maximal logit; -1 where the row has no normaliser."""
    return np.where(np.isnan(normaliser(z).rest), -1, argmax_of(z))


def rank(z, ids):
    """How many classes come before the id in a stable descending sort; -1 where the row has no normaliser."""
    z_y = np.take_along_axis(z, ids, axis=-1)[:, :, None]
    earlier = np.arange(z.shape[-1]) < ids[:, :, None]
    before = (z[:, None, :] > z_y) | ((z[:, None, :] == z_y) & earlier)
    return np.where(np.isnan(normaliser(z).rest)[:, None], -1, before.sum(axis=-1))


STATISTICS = {
    "logsumexp": log_sum_exp,
    "entropy": entropy,
    "mean_logit": mean_logit,
    "sum_sq_prob": sum_sq_prob,
    "max_prob": max_prob,
    "argmax": argmax,
}


def one_hot(ids, classes):
    return (np.arange(classes) == np.asarray(ids)[..., None]).astype(np.float64)


def log_prob_gradient(z, ids, upstream):
    """[j = y_k] - p_j, summed over the K ids with their upstreams [rows, K]"""
    gradient = np.zeros_like(z)
    for k in range(ids.shape[-1]):
        gradient -= upstream[:, k, None] * softmax_minus_one_hot(z, ids[:, k])
    return gradient


def entropy_gradient(z):
    """-p_j (log p_j + H)"""
    return -products(softmax(z), log_softmax(z) + entropy(z)[:, None])


def sum_sq_prob_gradient(z):
    """2 p_j (p_j - S)"""
    p = softmax(z)
    return 2 * p * (p - sum_sq_prob(z)[:, None])


def max_prob_gradient(z):
    """P ([j = argmax] - p_j)"""
    return -max_prob(z)[:, None] * softmax_minus_one_hot(z, argmax_of(z))


def mean_logit_gradient(z):
    return np.full_like(z, 1 / z.shape[-1])


STATISTIC_GRADIENTS = {
    "logsumexp": softmax,
    "entropy": entropy_gradient,
    "mean_logit": mean_logit_gradient,
    "sum_sq_prob": sum_sq_prob_gradient,
    "max_prob": max_prob_gradient,
}
