# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy of CUDA tensors, without a GPU: its calls go to the kernels as the CPU runs them.

Tensors stay on the CPU, which makes the products; `fastloss._cuda` is the emulated module of tests/cuda_emulation.
"""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from cuda_linear_helpers import (  # noqa: E402
    CLASSES,
    FEATURES,
    OPTIONS,
    TOKENS,
    TOLERANCE,
    assert_near,
    expected,
    factors,
    ids,
)
from fastloss.torch import ops  # noqa: E402
from torch_helpers import TORCH_DTYPES, seeded, seeded_ids, seeded_probabilities  # noqa: E402


@pytest.fixture(scope="module")
def oracle():
    """Made before anything is patched."""
    answers = {}
    for dtype in TORCH_DTYPES:
        for name, options in OPTIONS.items():
            for kind in ("ids", "soft"):
                target = ids() if kind == "ids" else seeded_probabilities(TOKENS, CLASSES)
                answers[dtype, name, kind] = expected(factors(TORCH_DTYPES[dtype]), target, **options)
    return answers


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_loss_and_gradients_are_those_of_the_logits(dtype, name, kind, chunk_tokens, oracle, linear):
    made = factors(TORCH_DTYPES[dtype])
    target = ids() if kind == "ids" else seeded_probabilities(TOKENS, CLASSES)
    bias = made[2]
    loss = fl.linear_cross_entropy(*made[:2], target, linear_bias=bias, chunk_tokens=chunk_tokens, **OPTIONS[name])
    assert loss.dtype == ops.accumulation_dtype(bias.dtype)
    exact, gradients = oracle[dtype, name, kind]
    assert_near(loss, exact, TOLERANCE[dtype])
    for ours, gradient in zip(torch.autograd.grad(loss, made), gradients, strict=True):
        assert ours.dtype == bias.dtype
        assert_near(ours, gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_losses_of_tokens_and_their_upstream_gradients(backward, linear):
    made, target = factors(), ids()
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    options = {"backward": backward, "threshold": 1e-9, "chunk_tokens": 6}
    losses = fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2], reduction="none", **options)
    logits = torch.nn.functional.linear(*made)
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses, exact, rtol=1e-9, atol=1e-12)
    for ours, gradient in zip(
        torch.autograd.grad(losses, made, upstream), torch.autograd.grad(exact, made, upstream), strict=True
    ):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_scaled_loss_scales_its_gradients(backward, linear):
    made, target = factors(), ids()
    options = {"linear_bias": made[2], "backward": backward, "seed": 3}
    plain = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    scaled = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options) * -2.5, made)
    loss = fl.linear_cross_entropy(*made[:2], target, **options)
    negated = torch.autograd.grad(loss, made, torch._neg_view(torch.tensor(2.5, dtype=loss.dtype)))
    for one, other, third in zip(scaled, plain, negated, strict=True):
        torch.testing.assert_close(one, -2.5 * other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(third, one, rtol=1e-12, atol=1e-14)


def test_class_weights_make_the_denominator(linear):
    made, target = factors(bias=False), ids()
    weight = torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)
    loss = fl.linear_cross_entropy(*made, target, weight=weight, chunk_tokens=4)
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target, weight=weight)
    torch.testing.assert_close(loss, exact)
    for ours, gradient in zip(torch.autograd.grad(loss, made), torch.autograd.grad(exact, made), strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


def test_nothing_counted_is_nan_without_gradients_and_a_denominator_makes_it_zero(linear):
    made = factors(bias=False)
    target = torch.full((TOKENS,), -100)
    loss = fl.linear_cross_entropy(*made, target)
    assert loss.isnan()
    assert all(not grad.any() for grad in torch.autograd.grad(loss, made))
    assert fl.linear_cross_entropy(*made, target, denominator=7.0) == 0


def test_no_tokens_at_all(linear):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    for backward in ("exact", "sampled"):
        target = torch.zeros(0, dtype=torch.long)
        loss = fl.linear_cross_entropy(hidden, weight, target, reduction="sum", backward=backward)
        assert loss == 0
        by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
        assert by_hidden.shape == hidden.shape
        assert torch.equal(by_weight, torch.zeros_like(weight))


def test_hidden_states_of_ignored_tokens_may_hold_anything(linear):
    made, target = factors(), ids()
    options = {"linear_bias": made[2], "chunk_tokens": 5}
    clean = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    with torch.no_grad():
        made[0][target == -100] = torch.nan
    dirty = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))


def test_more_entries_than_can_be_sorted_are_refused_before_any_work(linear, monkeypatch):
    made, target = factors(bias=False), ids()
    monkeypatch.setattr(linear, "MOST_ENTRIES", 21 * 301 - 1)
    monkeypatch.setattr(linear, "_forward", None)
    with pytest.raises(ValueError, match=r"input has 21 tokens with places for 301 entries each, more than the 6320"):
        fl.linear_cross_entropy(*made, target, backward="sampled", threshold=1e-9)


def test_id_out_of_range_is_nan_and_raises_when_debugging(linear, monkeypatch):
    made, target = factors(), ids()
    target[5] = CLASSES
    for backward in ("exact", "sampled"):
        losses = fl.linear_cross_entropy(*made[:2], target, reduction="none", backward=backward)
        assert losses.isnan().nonzero().tolist() == [[5]]
        (by_hidden,) = torch.autograd.grad(losses.sum(), made[0])
        assert by_hidden[5].isnan().all()
        assert by_hidden[:5].isfinite().all()
    monkeypatch.setattr(linear.cuda, "DEBUG", True)
    with pytest.raises(IndexError, match=rf"target\[5\] = {CLASSES} is out of range for {CLASSES} classes"):
        fl.linear_cross_entropy(*made[:2], target)
    with pytest.raises(IndexError, match=rf"target\[5\] = {CLASSES}"):
        fl.linear_logit_stats(*made[:2], target.clamp(min=0))


def test_second_derivatives_go_through_the_plain_formula(linear):
    made, target = factors(classes=7), ids(classes=7)
    seconds = []
    for loss in (
        fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2]),
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target),
    ):
        (grad,) = torch.autograd.grad(loss, made[0], create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), made[1])[0])
    torch.testing.assert_close(*seconds, rtol=1e-6, atol=1e-9)


def test_target_probabilities_get_a_gradient(linear):
    made, target = factors(), seeded_probabilities(TOKENS, CLASSES).requires_grad_()
    loss = fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2], chunk_tokens=4)
    (ours,) = torch.autograd.grad(loss, target)
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target)
    torch.testing.assert_close(ours, torch.autograd.grad(exact, target)[0], rtol=1e-6, atol=1e-9)


def test_module_takes_the_same_path(linear):
    criterion = fl.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, dtype=torch.float64, backward="sampled")
    hidden = seeded(TOKENS, FEATURES).requires_grad_()
    criterion(hidden, ids()).backward()
    assert criterion.linear.weight.grad.isfinite().all()


# ---- statistics ----


@pytest.mark.parametrize("k", [1, 3])
def test_statistics_of_chunks_and_their_gradients(k, linear, monkeypatch):
    made = factors()
    target = seeded_ids(CLASSES, TOKENS, k) if k > 1 else seeded_ids(CLASSES, TOKENS)
    want = ("logprob", "entropy", "rank")
    exact = fl.logit_stats(torch.nn.functional.linear(*made), target, want=want)
    gradients = torch.autograd.grad((exact.logprob.sum() + exact.entropy.square().sum()), made)

    def statistics(logits, ids, bias, dim, softcap, temperature, want):
        outputs = ops.stats_outputs(logits, ids, dim, want)
        outputs[-1] = outputs[-1].new_empty((len(logits), 3))  # as on a GPU
        linear.cuda.statistics(logits, ids.contiguous(), k, bias, dim, softcap, temperature, outputs, want)
        return outputs

    def gradient(logits, saved, coefficients, ids, g, bias, dim, softcap, temperature, inplace):
        contiguous = (saved.contiguous(), coefficients.contiguous(), ids.contiguous(), k, g.contiguous())
        linear.cuda.gradient(logits, *contiguous, bias, dim, softcap, temperature, logits)
        return logits

    monkeypatch.setattr(ops, "statistics", statistics)
    monkeypatch.setattr(ops, "gradient", gradient)
    stats = fl.linear_logit_stats(*made[:2], target, bias=made[2], want=want, chunk_tokens=5)
    torch.testing.assert_close(stats.logprob, exact.logprob, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats.entropy, exact.entropy, rtol=1e-6, atol=1e-9)
    assert torch.equal(stats.rank, exact.rank)
    ours = torch.autograd.grad((stats.logprob.sum() + stats.entropy.square().sum()), made)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
