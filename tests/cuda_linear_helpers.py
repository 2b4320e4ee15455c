# SPDX-License-Identifier: Apache-2.0
"""Factors and targets for tests of linear cross-entropy over the emulated module, and what it is compared with."""

import torch

import fastloss.torch as fl
import linear_helpers
from torch_helpers import seeded_ids

TOKENS, FEATURES, CLASSES = 21, 8, 301
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 6.0, "temperature": 0.8},
}
# Of the largest entry: the rounding of logits and gradients to 16 bits, as the CPU path has it.
TOLERANCE = {"float32": 1e-5, "float64": 1e-6, "float16": 5e-3, "bfloat16": 4e-2}


def factors(dtype=torch.float64, classes=CLASSES, bias=True):
    return linear_helpers.factors(dtype, TOKENS, classes, FEATURES)[: 3 if bias else 2]


def ids(classes=CLASSES, every=4):
    target = seeded_ids(classes, TOKENS)
    target[::every] = -100
    return target


def expected(factors, target, upstream=None, **options):
    """Loss and gradients in float64, from logits as `cross_entropy` of the CPU has them."""
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    loss = fl.cross_entropy(torch.nn.functional.linear(*exact), target, **options)
    return loss, torch.autograd.grad(loss, exact, upstream)


def assert_near(ours, exact, tolerance):
    error = (ours.double() - exact).abs().max()
    assert error <= tolerance * exact.abs().max(), f"off by {error / exact.abs().max():.1e}"
