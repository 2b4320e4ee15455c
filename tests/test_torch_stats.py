# SPDX-License-Identifier: Apache-2.0
"""`logit_stats`, `selective_log_softmax` and `entropy_from_logits` on tensors: values and gradients."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastloss.torch  # noqa: E402
import reference  # noqa: E402
from helpers import assert_gradient_close, transform_extra  # noqa: E402
from reference import Options  # noqa: E402
from torch_helpers import array, same_bits, seeded, seeded_ids  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

ALL = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")
DIFFERENTIABLE = ALL[:6]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def plain(name, logits, target=None):
    """The statistics in plain PyTorch, for gradients through autograd in float64."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    if name == "logprob":
        many = target.ndim == logits.ndim
        picked = log_p.gather(-1, target if many else target[..., None])
        return picked if many else picked[..., 0]
    return {
        "logsumexp": lambda: torch.logsumexp(logits, -1),
        "entropy": lambda: -(p * log_p).sum(-1),
        "mean_logit": lambda: logits.mean(-1),
        "sum_sq_prob": lambda: (p * p).sum(-1),
        "max_prob": lambda: p.amax(-1),
    }[name]()


def gradient_of(values, leaf, upstream):
    return torch.autograd.grad(values, leaf, upstream)[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_have_the_bits_of_the_numpy_api(dtype, name):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    logits, target = seeded(4, 6, 300, dtype=getattr(torch, dtype)), seeded_ids(300, 4, 6)
    ours = getattr(fastloss.torch.logit_stats(logits, target, want=(name,)), name)
    numpy = np.asarray(getattr(fastloss.logit_stats(array(logits), array(target), want=(name,)), name))
    if ours.is_cuda:  # which adds up in another order
        tolerance = 1e-14 if dtype == "float64" else 2e-6
        np.testing.assert_allclose(array(ours), numpy, rtol=tolerance, atol=tolerance)
    else:
        assert array(ours).tobytes() == numpy.tobytes()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_that_of_autograd(name):
    logits, target = seeded(5, 40), seeded_ids(40, 5)
    upstream = seeded(5, seed=2)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = getattr(fastloss.torch.logit_stats(ours, target, want=(name,)), name)
    expected = plain(name, theirs, target)
    torch.testing.assert_close(value, expected, **FLOAT64)
    torch.testing.assert_close(gradient_of(value, ours, upstream), gradient_of(expected, theirs, upstream), **FLOAT64)


def test_gradient_of_all_statistics_together_is_the_sum():
    logits, target = seeded(5, 40), seeded_ids(40, 5)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    stats = fastloss.torch.logit_stats(ours, target, want=DIFFERENTIABLE)
    sum((i + 1) * getattr(stats, name).sum() for i, name in enumerate(DIFFERENTIABLE)).backward()
    sum((i + 1) * plain(name, theirs, target).sum() for i, name in enumerate(DIFFERENTIABLE)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **FLOAT64)


@pytest.mark.parametrize("several", [1, 2, 5])
def test_gradient_of_several_targets_a_row_adds_up(several):
    logits, target = seeded(5, 12), seeded_ids(12, 5, several)
    target[0] = 3
    upstream = seeded(5, several, seed=2)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = fastloss.torch.logit_stats(ours, target, want=("logprob",)).logprob
    expected = plain("logprob", theirs, target)
    torch.testing.assert_close(value, expected, **FLOAT64)
    torch.testing.assert_close(gradient_of(value, ours, upstream), gradient_of(expected, theirs, upstream), **FLOAT64)


@pytest.mark.parametrize("name", reference.STATISTIC_GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_through_the_transform_is_within_the_bound(dtype, name):
    options = Options(softcap=10.0, temperature=0.8)
    logits = seeded(4, 300, dtype=getattr(torch, dtype)).requires_grad_()
    stats = fastloss.torch.logit_stats(logits, want=(name,), softcap=10.0, temperature=0.8)
    getattr(stats, name).sum().backward()
    x = array(logits)
    z, slope = options.transformed(x), options.slope(x)
    p, log_p = reference.softmax(z), reference.log_softmax(z)
    terms = {
        "logsumexp": p,
        "entropy": p * (2 * np.abs(log_p) + 2 * reference.entropy(z)[:, None]),
        "mean_logit": np.full_like(p, 1 / 300),
        "sum_sq_prob": 2 * p * (p + reference.sum_sq_prob(z)[:, None]),
        "max_prob": reference.max_prob(z)[:, None] * (p + reference.one_hot(np.argmax(z, axis=-1), 300)),
    }[name]
    exact = slope * reference.STATISTIC_GRADIENTS[name](z)
    assert_gradient_close(array(logits.grad), exact, slope * terms, log_p, x.dtype, transform_extra(x, options), 10.0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_dim_is_the_class_dimension(dim):
    logits = seeded(4, 5, 6)
    moved = logits.movedim(dim, -1)
    target = seeded_ids(moved.shape[-1], *moved.shape[:-1])
    stats = fastloss.torch.logit_stats(logits, target, dim=dim, want=ALL)
    expected = fastloss.torch.logit_stats(moved.contiguous(), target, want=ALL)
    for name in ALL:
        ours, theirs = getattr(stats, name), getattr(expected, name)
        if ours.is_cuda:  # which adds up in another order
            torch.testing.assert_close(ours, theirs)
        else:
            assert same_bits(ours, theirs)


def test_argmax_and_rank_need_no_graph():
    logits = seeded(4, 5).requires_grad_()
    stats = fastloss.torch.logit_stats(logits, seeded_ids(5, 4), want=("argmax", "rank"))
    assert not stats.argmax.requires_grad
    assert not stats.rank.requires_grad


def test_statistics_not_asked_for_are_none():
    stats = fastloss.torch.logit_stats(seeded(4, 5), want=("entropy",))
    assert [name for name in ALL if getattr(stats, name) is not None] == ["entropy"]


def test_statistics_without_gradients_leave_no_graph():
    assert not fastloss.torch.logit_stats(seeded(4, 5), want=("entropy",)).entropy.requires_grad
    with torch.no_grad():
        leaf = seeded(4, 5).requires_grad_()
        assert not fastloss.torch.logit_stats(leaf, want=("entropy",)).entropy.requires_grad


def test_unused_statistic_has_no_part_in_the_gradient():
    logits = seeded(4, 5).requires_grad_()
    stats = fastloss.torch.logit_stats(logits, want=("entropy", "logsumexp", "sum_sq_prob"))
    stats.logsumexp.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1), **FLOAT64)


def test_masked_logits_have_finite_gradients():
    logits = seeded(3, 9)
    logits[:, :4] = -torch.inf
    for name in ("logsumexp", "entropy", "sum_sq_prob", "max_prob"):
        leaf = logits.clone().requires_grad_()
        getattr(fastloss.torch.logit_stats(leaf, want=(name,)), name).sum().backward()
        assert torch.all(torch.isfinite(leaf.grad))
        assert torch.all(leaf.grad[:, :4] == 0)


# ---- the functions that TRL uses ----


def test_selective_log_softmax_has_the_signature_of_trl():
    parameters = inspect.signature(fastloss.torch.selective_log_softmax).parameters
    assert list(parameters)[:2] == ["logits", "index"]
    assert parameters["temperature"].default == 1.0


def test_entropy_from_logits_has_the_signature_of_trl():
    assert next(iter(inspect.signature(fastloss.torch.entropy_from_logits).parameters)) == "logits"


@pytest.mark.parametrize("index_shape", [(3, 7), (3, 7, 1), (3, 7, 4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax_gathers_log_probabilities(temperature, index_shape):
    logits, index = seeded(3, 7, 50), seeded_ids(50, *index_shape)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = fastloss.torch.selective_log_softmax(ours, index, temperature=temperature)
    expected = plain("logprob", theirs / temperature, index)
    upstream = seeded(*index_shape, seed=4)
    torch.testing.assert_close(value, expected, **FLOAT64)
    torch.testing.assert_close(gradient_of(value, ours, upstream), gradient_of(expected, theirs, upstream), **FLOAT64)


@pytest.mark.parametrize("shape", [(6, 50), (3, 7, 50), (2, 3, 4, 50)], ids=str)
def test_entropy_from_logits_is_the_entropy(shape):
    ours, theirs = seeded(*shape).requires_grad_(), seeded(*shape).requires_grad_()
    value, expected = fastloss.torch.entropy_from_logits(ours), plain("entropy", theirs)
    assert value.shape == shape[:-1]
    upstream = seeded(*shape[:-1], seed=4)
    torch.testing.assert_close(value, expected, **FLOAT64)
    torch.testing.assert_close(gradient_of(value, ours, upstream), gradient_of(expected, theirs, upstream), **FLOAT64)
