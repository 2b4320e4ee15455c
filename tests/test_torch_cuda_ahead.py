# SPDX-License-Identifier: Apache-2.0
"""Gradients that forward makes on a GPU for the upstream gradient that it expects, over the emulated module.

As there, backward always starts the kernel, which leaves alone what forward made rightly.
"""

import contextlib
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch as fl  # noqa: E402
from cuda_binding import load_emulation  # noqa: E402
from fastloss.torch import ahead, autograd  # noqa: E402
from torch_helpers import (  # noqa: E402
    TORCH_DTYPES,
    nothing_made_ahead,
    same_bits,
    seeded,
    seeded_ids,
    torch_over_emulation,
    watched_trips,
)

emulated = load_emulation()


@pytest.fixture(autouse=True)
def expectation(monkeypatch):
    """That of the emulated GPU."""
    with torch_over_emulation(emulated, monkeypatch):
        yield autograd.expectation_of(None)


@pytest.fixture
def trips(expectation, monkeypatch):
    """What kernels did."""
    return watched_trips(monkeypatch)


def problem(rows=9, classes=9001, dtype=torch.float32):
    return seeded(rows, classes, dtype=dtype).requires_grad_(), seeded_ids(classes, rows)


def loss_and_gradient(logits, target, factor=1.0, **options):
    loss = fl.cross_entropy(logits, target, **options) * factor
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(9, 10), (9, 9001), (2, 40_000)])
@pytest.mark.parametrize("factor", [1.0, 0.125, -0.3, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}], ids=str)
def test_bits_depend_on_nothing_that_was_expected(options, factor, rows, classes, dtype, expectation, trips):
    logits, target = problem(rows, classes, TORCH_DTYPES[dtype])
    with nothing_made_ahead(expectation):
        expected = loss_and_gradient(logits, target, factor, **options)
    assert trips == ["forward", "made"]
    trips.clear()
    expectation._next.fill_(1.0)
    expectation._surprised.zero_()
    found = loss_and_gradient(logits, target, factor, **options)
    assert trips == ["both", "kept" if factor == 1.0 else "made"]
    assert all(map(same_bits, found, expected))


def test_scaled_loss_is_expected_once_it_came_twice(trips):
    logits, target = problem()
    for _ in range(4):
        (fl.cross_entropy(logits, target) * 0.25).backward()
    assert trips == ["both", "made", "forward", "made", "both", "kept", "both", "kept"]


def test_scale_of_a_float64_loss_is_expected_to_the_bit(trips):
    logits, target = problem(dtype=torch.float64)
    for _ in range(3):
        (fl.cross_entropy(logits, target) * 0.1).backward()
    assert trips[-2:] == ["both", "kept"]


def test_scale_that_changes_at_every_step_wastes_one_gradient(trips):
    logits, target = problem()
    for step in range(2, 7):
        (fl.cross_entropy(logits, target) / step).backward()
    assert trips == ["both", "made"] + ["forward", "made"] * 4


def test_host_that_learns_late_gets_the_same_bits(expectation, trips):
    logits, target = problem()
    _, found = loss_and_gradient(logits, target, 3.0)
    expectation._surprised.zero_()  # nothing heard of it yet
    expectation._next.fill_(torch.nan)  # as another stream may leave it
    _, again = loss_and_gradient(logits, target, 3.0)
    assert trips == ["both", "made"] * 2
    assert same_bits(found, again)


@pytest.mark.parametrize("factor", [0.0, torch.inf, torch.nan])
def test_upstream_that_is_no_guide_is_forgotten(factor, trips):
    logits, target = problem()
    for f in (factor, 1.0, 1.0):
        (fl.cross_entropy(logits, target) * f).backward()
    assert trips == ["both", "made", "forward", "made", "both", "kept"]


def test_expectation_may_change_between_forward_and_backward(trips):
    logits, target = problem()
    loss = fl.cross_entropy(logits, target)
    (fl.cross_entropy(logits, target) * 4).backward()
    loss.backward()
    assert trips == ["both", "both", "made", "kept"]


def test_loss_that_is_only_logged_costs_few_gradients(trips):
    logits, target = problem(classes=10)
    for _ in range(100):
        fl.cross_entropy(logits, target).backward()
        fl.cross_entropy(logits, target).item()
    assert 1 <= trips.count("both") <= 2 * 100 / ahead.AFTER_NOTHING
    for _ in range(ahead.AFTER_NOTHING + 1):
        fl.cross_entropy(logits, target).backward()
    assert trips[-2:] == ["both", "kept"]


def test_losses_that_wait_for_one_backward_keep_one_large_gradient(trips, monkeypatch):
    logits, target = problem()
    monkeypatch.setattr(ahead, "RECYCLED_FROM", logits.nbytes)
    sum(fl.cross_entropy(logits * i, target) for i in range(3)).backward()
    assert sorted(trips) == ["both", "forward", "forward", "kept", "made", "made"]


def test_second_backward_makes_the_gradient_again(trips):
    logits, target = problem()
    loss = fl.cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert trips == ["both", "kept", "made"]
    assert same_bits(second, kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_no_gradient(reentrant, trips, expectation):
    logits, target = problem()
    loss = checkpoint(lambda x: fl.cross_entropy(x * 2, target), logits, use_reentrant=reentrant)
    assert trips == ["forward"]
    loss.backward()
    assert expectation.steady


@pytest.mark.parametrize("call", ["no_grad", "none", "inplace"])
def test_no_gradient_is_made_where_none_can_be_expected(call, trips):
    logits, target = problem()
    with contextlib.nullcontext() if call != "no_grad" else torch.no_grad():
        options = {"none": {"reduction": "none"}, "inplace": {"inplace": "backward"}}.get(call, {})
        fl.cross_entropy(logits * 1, target, **options)
    assert trips == ["forward"]


def test_graph_in_the_making_does_not_own_what_a_gpu_expects(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0))
    assert ahead.expectation_of(on_gpu) is None
    assert not ahead._of_gpus
