# SPDX-License-Identifier: Apache-2.0
"""Gradients that forward makes for the upstream gradient that it expects: when, and never with other bits."""

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch as fl  # noqa: E402
from fastloss.torch import ahead, linear_autograd, ops  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def expectation(monkeypatch):
    """As at the start of a process."""
    fresh = ahead.Expectation()
    monkeypatch.setattr(ahead, "expectation", fresh)
    monkeypatch.setattr(linear_autograd, "expectation", fresh)
    return fresh


@pytest.fixture
def trips(monkeypatch):
    """The names of the kernels that ran: forward, forward with the gradient, backward."""
    names = []

    def forward(*arguments, **options):
        names.append("both" if len(arguments) > 8 else "forward")
        return run_forward(*arguments, **options)

    def backward(*arguments, **options):
        names.append("backward")
        return run_backward(*arguments, **options)

    run_forward, run_backward = ops.cross_entropy, ops.cross_entropy_backward
    monkeypatch.setattr(ops, "cross_entropy", forward)
    monkeypatch.setattr(ops, "cross_entropy_backward", backward)
    return names


def problem(classes=5000, dtype=torch.float32):
    return seeded(6, classes, dtype=dtype).requires_grad_(), seeded_ids(classes, 6)


def two_trips(logits, target, factor=1.0, **options):
    """The gradient from a loss of each row."""
    denominator = options.pop("denominator", target.shape[0])
    rows = fl.cross_entropy(logits, target, reduction="none", **options)
    return torch.autograd.grad(rows, logits, torch.full_like(rows, factor / denominator))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 4096, 4097, 9001])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"softcap": 5.0}, {"temperature": 2.0}], ids=str
)
def test_gradient_of_one_trip_has_the_bits_of_two(options, classes, dtype, trips):
    logits, target = problem(classes, dtype)
    expected = two_trips(logits, target, denominator=8, **options)
    trips.clear()
    (once,) = torch.autograd.grad(fl.cross_entropy(logits, target, denominator=8, **options), logits)
    assert trips == ["both"]
    assert same_bits(once, expected)


def test_rows_that_are_ignored_have_zeros(trips):
    logits, target = problem()
    target[1:3] = -100
    fl.cross_entropy(logits, target).backward()
    assert trips == ["both"]
    assert not logits.grad[1:3].any()
    assert logits.grad[0].any()


def test_all_rows_ignored_give_zeros():
    logits, target = problem()
    fl.cross_entropy(logits, torch.full_like(target, -100)).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_soft_targets_get_their_gradients(trips):
    logits, target = seeded(4, 50).requires_grad_(), seeded_probabilities(4, 50).requires_grad_()
    grads = torch.autograd.grad(fl.cross_entropy(logits, target), (logits, target))
    assert trips == ["both"]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), (logits, target))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_expectation_changes_no_bit(dtype, trips):
    logits, target = problem(dtype=dtype)
    expected = two_trips(logits, target, 0.125, denominator=8)
    trips.clear()
    (grad,) = torch.autograd.grad(fl.cross_entropy(logits, target, denominator=8) * 0.125, logits)
    assert trips == ["both", "backward"]
    assert same_bits(grad, expected)


def test_scaled_loss_is_expected_once_it_came_twice(trips):
    logits, target = problem()
    for _ in range(4):
        (fl.cross_entropy(logits, target) * 0.25).backward()
    assert trips == ["both", "backward", "forward", "backward", "both", "both"]


def test_loss_that_is_only_logged_costs_few_gradients(trips):
    logits, target = problem()
    for _ in range(100):
        fl.cross_entropy(logits, target).backward()
        fl.cross_entropy(logits, target).item()
    assert 1 <= trips.count("both") <= 2 * 100 / ahead.AFTER_NOTHING
    for _ in range(ahead.AFTER_NOTHING + 1):
        fl.cross_entropy(logits, target).backward()
    assert trips[-1] == "both"


def test_losses_that_wait_for_one_backward_keep_one_large_gradient(trips, monkeypatch):
    logits, target = problem()
    monkeypatch.setattr(ahead, "RECYCLED_FROM", logits.nbytes)
    losses = [fl.cross_entropy(logits * i, target) for i in range(3)]
    sum(losses).backward()
    assert sorted(trips) == ["backward", "backward", "both", "forward", "forward"]


def test_small_losses_neither_take_nor_wait_for_the_place_of_a_large_one(trips, monkeypatch):
    logits, target = problem()
    monkeypatch.setattr(ahead, "RECYCLED_FROM", logits.nbytes)
    small = logits[:, :10], target % 10
    (fl.cross_entropy(*small) + fl.cross_entropy(logits, target) + fl.cross_entropy(*small)).backward()
    assert trips == ["both"] * 3


def test_second_backward_makes_the_gradient_again(trips):
    logits, target = problem()
    loss = fl.cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert trips == ["both", "backward"]
    assert same_bits(second, kept)


def test_second_derivative_after_a_gradient_was_made():
    logits, target = seeded(3, 7).requires_grad_(), seeded_ids(7, 3)

    def second(function):
        (grad,) = torch.autograd.grad(function(logits, target), logits, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    torch.testing.assert_close(second(fl.cross_entropy), second(torch.nn.functional.cross_entropy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_gradients_of_16_bits_are_rounded_once_for_any_upstream(dtype):
    hidden, weight = (seeded(n, 32, scale=0.3, dtype=dtype).requires_grad_() for n in (8, 500))
    target = seeded_ids(500, 8)
    for factor in (1.0, 0.3, 0.3, 0.3, 2.0**-20, 0.0, 2.0**-20):
        loss = fl.linear_cross_entropy(hidden, weight, target) * factor
        rows = fl.linear_cross_entropy(hidden, weight, target, reduction="none")
        expected = torch.autograd.grad(rows, (hidden, weight), torch.full_like(rows, factor / 8))
        assert all(map(same_bits, torch.autograd.grad(loss, (hidden, weight)), expected))


def test_linear_gradients_that_float16_is_too_small_for_come_back_with_the_scale_of_the_loss():
    hidden, weight = (seeded(n, 32, scale=0.01, dtype=torch.float16).requires_grad_() for n in (8, 500))
    loss = fl.linear_cross_entropy(hidden, weight, seeded_ids(500, 8), denominator=1e6)
    (grad,) = torch.autograd.grad(loss * 2.0**16, weight)
    assert torch.count_nonzero(grad) > 0.9 * grad.numel()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_no_gradient(reentrant, trips, expectation):
    logits, target = problem()
    loss = checkpoint(lambda x: fl.cross_entropy(x * 2, target), logits, use_reentrant=reentrant)
    assert trips == ["forward"]
    loss.backward()
    assert expectation.steady


@pytest.mark.parametrize("call", ["no_grad", "none", "inplace", "frozen"])
def test_no_gradient_is_made_where_none_can_be_expected(call, trips):
    logits, target = problem()
    if call == "no_grad":
        with torch.no_grad():
            fl.cross_entropy(logits, target)
    elif call == "none":
        fl.cross_entropy(logits, target, reduction="none")
    elif call == "inplace":
        fl.cross_entropy(logits * 1, target, inplace="backward")
    else:
        fl.cross_entropy(logits.detach(), torch.softmax(logits, 1))
    assert trips == ["forward"]


def test_gradient_goes_where_autograd_was_asked_for_it_alone(trips):
    logits, target = seeded(4, 50).requires_grad_(), seeded_probabilities(4, 50).requires_grad_()
    (by_target,) = torch.autograd.grad(fl.cross_entropy(logits, target), target)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), target)
    torch.testing.assert_close(by_target, expected)
