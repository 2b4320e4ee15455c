# SPDX-License-Identifier: Apache-2.0
"""Factors, targets and options for tests of linear cross-entropy, and what it is compared with."""

import pytest
import torch
from torch.nn import functional as F

import fastloss.torch
from torch_helpers import seeded, seeded_ids, seeded_probabilities

TOKENS, CLASSES, FEATURES = 13, 37, 5
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
CLASS_WEIGHT, LOGIT_BIAS = seeded(CLASSES, seed=3).abs() + 0.1, seeded(CLASSES, seed=4, scale=1.0)
# Options that F.cross_entropy has too, and those that only ours has, whose reference is our own cross_entropy.
OPTIONS = {
    "plain": {},
    "class weight and smoothing": {"weight": CLASS_WEIGHT, "label_smoothing": 0.2},
    "extras": {"z_loss": 0.1, "softcap": 3.0, "temperature": 0.7, "logit_bias": LOGIT_BIAS},
}

on_each_device = pytest.mark.usefixtures("device")


def factors(dtype=torch.float64, tokens=TOKENS, classes=CLASSES, features=FEATURES):
    shapes = ((tokens, features), (classes, features), (classes,))
    return [seeded(*shape, seed=i, scale=1.0, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def targets(kind, tokens=TOKENS, classes=CLASSES):
    if kind == "soft":
        return seeded_probabilities(tokens, classes)
    ids = seeded_ids(classes, tokens)
    if kind == "ignored":
        ids[::3] = -100
    return ids


def reference(hidden, matrix, bias, target, **options):
    return fastloss.torch.cross_entropy(F.linear(hidden, matrix, bias), target, **options)


def assert_same_gradients(loss, expected, inputs, upstream=None, tolerance=FLOAT64):
    torch.testing.assert_close(loss, expected, **tolerance, equal_nan=True)
    upstream = torch.ones_like(expected) if upstream is None else upstream
    got = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, inputs, upstream, retain_graph=True), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance, equal_nan=True)
