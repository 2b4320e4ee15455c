# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against PyTorch in float64 where it is installed, and against central differences."""

import numpy as np
import pytest

import reference
from reference import Options

ROWS, CLASSES = 5, 7
TARGET = np.array([0, 6, reference.IGNORED, 3, 3])


@pytest.fixture
def logits(rng):
    return 3 * rng.standard_normal((ROWS, CLASSES))


@pytest.fixture
def weight(rng):
    return rng.uniform(0.5, 2, CLASSES)


@pytest.fixture
def soft_target(rng):
    return rng.dirichlet(np.ones(CLASSES), ROWS)


def central_difference(function, x, step=1e-5):
    """The gradient of the sum of function(x)."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[i] += step
        behind[i] -= step
        gradient[i] = (np.sum(function(ahead)) - np.sum(function(behind))) / (2 * step)
    return gradient


EVERY_OPTION = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.5},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "temperature": 0.7, "softcap": 2.5},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_cross_entropy_is_pytorchs(logits, weight, soft_target, weighted, soft, reduction, smoothing):
    torch = pytest.importorskip("torch")
    target = soft_target if soft else TARGET
    options = Options(weight=weight if weighted else None, label_smoothing=smoothing)
    x = torch.tensor(logits, requires_grad=True)
    q = torch.tensor(target, requires_grad=soft)
    w = torch.tensor(weight) if weighted else None
    loss = torch.nn.functional.cross_entropy(x, q, weight=w, reduction=reduction, label_smoothing=smoothing)
    loss.sum().backward()
    np.testing.assert_allclose(reference.cross_entropy(logits, target, options, reduction), loss.detach(), rtol=1e-13)
    gradient = reference.cross_entropy_gradient(logits, target, options, reduction)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-12, atol=1e-15)
    if soft:
        gradient = reference.soft_target_gradient(logits, target, options, reduction)
        np.testing.assert_allclose(gradient, q.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_gradient_of_cross_entropy_is_the_central_difference(logits, weight, soft_target, rng, name, soft):
    target = soft_target if soft else TARGET
    options = Options(weight=weight, bias=rng.standard_normal(CLASSES), **EVERY_OPTION[name])
    expected = central_difference(lambda x: reference.cross_entropy(x, target, options), logits)
    np.testing.assert_allclose(reference.cross_entropy_gradient(logits, target, options), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_gradient_by_soft_targets_is_the_central_difference(logits, weight, soft_target, name):
    options = Options(weight=weight, **EVERY_OPTION[name])
    expected = central_difference(lambda q: reference.cross_entropy(logits, q, options), soft_target)
    actual = reference.soft_target_gradient(logits, soft_target, options)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", reference.STATISTIC_GRADIENTS)
def test_gradient_of_statistic_is_the_central_difference(logits, name):
    expected = central_difference(reference.STATISTICS[name], logits)
    np.testing.assert_allclose(reference.STATISTIC_GRADIENTS[name](logits), expected, rtol=1e-7, atol=1e-9)


def test_gradient_of_log_prob_is_the_central_difference(logits):
    ids = np.array([[0, 6], [1, 1], [2, 3], [5, 4], [6, 0]])
    upstream = np.linspace(-1, 2, ids.size).reshape(ids.shape)
    expected = central_difference(lambda x: upstream * reference.log_prob(x, ids), logits)
    actual = reference.log_prob_gradient(logits, ids, upstream)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


def test_log_softmax_keeps_its_digits_on_a_confident_row():
    # log(1 + r) = r - r^2/2 + ..., r = exp(-40)
    assert reference.log_softmax(np.array([[10000.0, 9960.0]]))[0, 0] == pytest.approx(-np.exp(-40.0), rel=1e-15)


def test_rank_counts_ties_before_the_target_only():
    z = np.array([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert reference.rank(z, np.array([[0, 1, 2, 3, 4]])).tolist() == [[1, 0, 2, 3, 4]]
