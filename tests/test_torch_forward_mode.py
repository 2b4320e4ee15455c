# SPDX-License-Identifier: Apache-2.0
"""Forward mode, second derivatives, and what the plain formulas behind them must agree on with the kernels."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

import fastloss.torch as fl  # noqa: E402
from fastloss.torch import ops, plain  # noqa: E402
from torch_helpers import seeded, seeded_ids, seeded_probabilities  # noqa: E402
from transform_helpers import (  # noqa: E402
    CLASSES,
    FEATURES,
    FLOAT64,
    HEAD,
    ON_EACH_DEVICE,
    TOKENS,
    compiled,
    each_function,
    example,
)

pytestmark = ON_EACH_DEVICE


@each_function
def test_tangents_of_dual_tensors(name):
    ours, theirs, x, y = example(name)
    tangents = []
    for function in (ours, theirs):
        with forward_ad.dual_level():
            loss = function(forward_ad.make_dual(x, seeded(*x.shape, seed=9)), y)
            tangents.append(forward_ad.unpack_dual(loss).tangent)
    torch.testing.assert_close(*tangents, **FLOAT64)


@each_function
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_jvp_and_hessian(compiling, name):
    ours, theirs, x, y = example(name)
    tangent = seeded(*x.shape, seed=9)
    if compiling:
        torch.set_default_device(None)  # under one, PyTorch does not trace torch.func
    for transform in (
        lambda f: lambda x: torch.func.jvp(lambda x: f(x, y), (x,), (tangent,)),
        lambda f: torch.func.hessian(lambda x: f(x, y)),
    ):
        actual = compiled(transform(ours)) if compiling else transform(ours)
        torch.testing.assert_close(actual(x), transform(theirs)(x), **FLOAT64)


def test_forward_mode_of_every_option_and_statistic():
    x, y = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS)
    y[1] = -100
    options = {"weight": seeded(CLASSES, seed=3).abs(), "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}
    statistics = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")

    def loss(x):
        return fl.cross_entropy(x, y, **options)

    def stats(x):
        return tuple(fl.logit_stats(x, y.clamp(min=0), want=statistics, temperature=0.7))

    for function in (loss, stats):
        value, tangent = torch.func.jvp(function, (x,), (seeded(*x.shape, seed=9),))
        torch.testing.assert_close(value, function(x), **FLOAT64)
        number = None if torch.is_tensor(value) else 6
        rows, back = torch.func.vjp(lambda x, f=function, n=number: f(x) if n is None else f(x)[:n], x)
        cotangent = torch.ones_like(rows) if number is None else tuple(map(torch.ones_like, rows))
        forward = tangent if number is None else sum(part.sum() for part in tangent[:number])
        torch.testing.assert_close(forward, (back(cotangent)[0] * seeded(*x.shape, seed=9)).sum(), **FLOAT64)


@pytest.mark.parametrize("call", ["cross_entropy", "logit_stats", "linear_cross_entropy", "linear_logit_stats"])
def test_ids_out_of_range_raise_in_forward_mode_and_are_nan_on_a_gpu(call, device):
    x, wrong = (seeded(2, CLASSES), torch.tensor([0, CLASSES]))
    if call.startswith("linear"):
        x, head = seeded(2, FEATURES), HEAD.to(device)
    functions = {
        "cross_entropy": lambda x: fl.cross_entropy(x, wrong, reduction="none"),
        "logit_stats": lambda x: fl.logit_stats(x, wrong).logprob,
        "linear_cross_entropy": lambda x: fl.linear_cross_entropy(x, head, wrong, reduction="none"),
        "linear_logit_stats": lambda x: fl.linear_logit_stats(x, head, wrong).logprob,
    }
    for transform in (lambda f: torch.func.jvp(f, (x,), (x,))[0], lambda f: torch.func.jacfwd(f)(x).sum(-1).sum(-1)):
        if device == "cuda":
            assert transform(functions[call]).isnan().tolist() == [False, True]
            continue
        with pytest.raises(IndexError, match=r"target\[1\] = 5 is out of range for 5 classes"):
            transform(functions[call])


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_ids_that_nobody_sees_before_they_are_looked_up_raise(wrong, device):
    if device == "cuda":
        pytest.skip("a GPU does not raise")
    x, ids = seeded(3, 2, CLASSES), torch.tensor([[0, 1], [1, wrong], [2, 0]])

    def tangent(x, y):
        return torch.func.jvp(lambda x: fl.cross_entropy(x, y), (x,), (x,))[1]

    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        torch.func.vmap(tangent)(x, ids)


def test_ids_out_of_range_are_nan_in_the_plain_formulas_of_a_gpu(monkeypatch):
    monkeypatch.setattr(plain, "pick", plain.look_up_or_nan)
    x, ids = seeded(4, CLASSES), torch.tensor([0, CLASSES, -1, -100])
    weight, want = seeded(CLASSES, seed=3).abs(), [True] + 5 * [False]

    def losses(x):
        return plain.row_losses(x, ids, weight, None, ops.Options(1, -100, 0.1, 0.2, 0.0, 1.0))

    def logprob(x, ids=ids):
        return plain.statistics(x, ids, None, 1, 0.0, 1.0, want)[0]

    for function, expected in ((losses, [False, True, True, False]), (logprob, [False, True, True, True])):
        value, tangent = torch.func.jvp(function, (x,), (x,))
        assert value.isnan().tolist() == tangent.isnan().tolist() == expected
        (grad,) = torch.func.vjp(function, x)[1](torch.ones_like(value))
        assert grad.isnan().any(1).tolist() == expected
    assert logprob(x[:1], ids[None]).isnan().tolist() == [[False, True, True, True]]


def test_numbers_in_tensors_under_torch_func():
    x, y = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS)
    options = {"label_smoothing": 0.1, "z_loss": 0.2, "temperature": 2.0}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
    found, expected = (torch.func.grad(lambda x, o=o: fl.cross_entropy(x, y, **o))(x) for o in (tensors, options))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["temperature", "z_loss", "softcap"])
def test_numbers_with_a_tangent_raise(name):
    with forward_ad.dual_level():
        number = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            fl.cross_entropy(seeded(2, CLASSES), torch.tensor([0, 1]), **{name: number})


@pytest.mark.parametrize("target", ["ids", "soft"])
def test_second_derivatives_and_tangents_of_logits_with_a_large_common_part(target):
    x = seeded(TOKENS, 300).float() + 1e4
    tangent = seeded(TOKENS, 300, seed=2).float()
    y = seeded_ids(300, TOKENS) if target == "ids" else seeded_probabilities(TOKENS, 300).float()

    def product(x, tangent, y):
        def loss(x):
            return fl.cross_entropy(x, y, label_smoothing=0.1)

        return torch.func.grad(lambda x: (torch.func.grad(loss)(x) * tangent).sum())(x), torch.func.jvp(loss, (x,), (tangent,))

    wide = [t.double() if t.is_floating_point() else t for t in (x, tangent, y)]
    found, exact = product(x, tangent, y), product(*wide)
    size = float(exact[0].abs().max())
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.0, atol=2e-6 * size)
    torch.testing.assert_close([t.double() for t in found[1]], list(exact[1]), rtol=1e-5, atol=1e-7)


def test_forward_mode_of_masked_classes_without_weight_is_finite():
    x = seeded(2, CLASSES)
    x[:, 1] = -math.inf
    weight, soft = torch.ones(CLASSES).double(), seeded_probabilities(2, CLASSES)
    weight[1] = soft[:, 1] = 0
    for given in ((soft,), (torch.tensor([1, 2]), weight), (torch.tensor([0, 2]), weight, None, -100, None, "mean", 0.3)):
        eager = fl.cross_entropy(x, *given)
        loss, tangent = torch.func.jvp(lambda x, given=given: fl.cross_entropy(x, *given), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(loss, eager)
        assert bool(torch.isfinite(tangent))


@pytest.mark.parametrize("mapped", [torch.func.vmap, None], ids=["vmap", "jvp"])
def test_means_of_nothing_are_those_of_eager_mode(mapped):
    x, y = seeded(2, CLASSES), torch.tensor([0, 1])
    nothing, unknown = torch.tensor([0.0, 0, 1, 1, 1]).double(), torch.tensor([math.nan, 1, 1, 1, 1]).double()
    for weight, ignored in ((nothing, -100), (unknown, 0)):
        options = {"weight": weight, "label_smoothing": 0.1 if ignored else 0.0, "ignore_index": ignored}
        if mapped is None:
            found, _ = torch.func.jvp(lambda x, o=options: fl.cross_entropy(x, y, **o), (x,), (x,))
        else:
            found = mapped(lambda x, o=options: fl.cross_entropy(x, y, **o))(x[None])[0]
        torch.testing.assert_close(found, fl.cross_entropy(x, y, **options), equal_nan=True)


def test_a_backward_with_a_tangent_raises():
    leaf = seeded(TOKENS, CLASSES).requires_grad_()
    loss = fl.cross_entropy(leaf, seeded_ids(CLASSES, TOKENS))
    one = torch.ones_like(loss)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="cross_entropy_backward has no derivative"),
    ):
        torch.autograd.grad(loss, leaf, forward_ad.make_dual(one, one))
