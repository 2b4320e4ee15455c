# SPDX-License-Identifier: Apache-2.0
"""Tensors that have elements and no memory: autograd's zero tensors count as zeros, freed storage raises.

A wrong access ends the process by a signal, and with it the run of the tests.
"""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from torch_helpers import seeded, seeded_ids, seeded_probabilities  # noqa: E402

TOKENS, CLASSES, FEATURES = 4, 5, 3


def zero(*shape, dtype=torch.float64):
    tensor = torch._efficientzerotensor(shape, dtype=dtype)
    assert tensor._is_zerotensor()
    return tensor


def freed(tensor):
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def tensors():
    """By the names of the arguments."""
    return {
        "input": seeded(TOKENS, CLASSES),
        "target": seeded_ids(CLASSES, TOKENS),
        "weight": seeded(CLASSES, seed=1).abs(),
        "logit_bias": seeded(CLASSES, seed=2),
    }


def linear_tensors():
    return {
        "input": seeded(TOKENS, FEATURES),
        "linear_weight": seeded(CLASSES, FEATURES, seed=1),
        "target": seeded_ids(CLASSES, TOKENS),
        "linear_bias": seeded(CLASSES, seed=2),
        "weight": seeded(CLASSES, seed=3).abs(),
        "logit_bias": seeded(CLASSES, seed=4),
    }


def linear_stats_tensors():
    return {
        "hidden": seeded(TOKENS, FEATURES),
        "weight": seeded(CLASSES, FEATURES, seed=1),
        "target": seeded_ids(CLASSES, TOKENS),
        "bias": seeded(CLASSES, seed=2),
        "logit_bias": seeded(CLASSES, seed=4),
    }


def stats_tensors():
    return {"logits": seeded(TOKENS, CLASSES), "target": seeded_ids(CLASSES, TOKENS), "bias": seeded(CLASSES, seed=2)}


def selective_tensors():
    return {"logits": seeded(TOKENS, CLASSES), "index": seeded_ids(CLASSES, TOKENS)}


CALLS = {
    "cross_entropy": (fl.cross_entropy, tensors),
    "logit_stats": (lambda **given: fl.logit_stats(**given).logprob, stats_tensors),
    "selective_log_softmax": (fl.selective_log_softmax, selective_tensors),
    "linear_cross_entropy": (fl.linear_cross_entropy, linear_tensors),
    "linear_logit_stats": (lambda **given: fl.linear_logit_stats(**given).logprob, linear_stats_tensors),
}
CASES = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments()]


@pytest.mark.parametrize(("call", "name"), CASES)
@pytest.mark.parametrize("as_it_is", [True, False], ids=["", "of another dtype"])
def test_freed_storage_raises_and_names_the_argument(call, name, as_it_is):
    function, given = CALLS[call][0], CALLS[call][1]()
    if not as_it_is:
        given = {n: t.to(torch.float16 if t.is_floating_point() else torch.int16) for n, t in given.items()}
    given[name] = freed(given[name])
    with pytest.raises(ValueError, match=rf"^{name} has no memory"):
        function(**given)
    if name in ("input", "logits", "hidden"):
        given[name].requires_grad_()
        with pytest.raises(ValueError, match=rf"^{name} has no memory"):
            function(**given)


def test_freed_probabilities_raise():
    with pytest.raises(ValueError, match=r"^target has no memory"):
        fl.cross_entropy(seeded(TOKENS, CLASSES), freed(seeded_probabilities(TOKENS, CLASSES)))
    with pytest.raises(ValueError, match=r"^target has no memory"):
        fl.linear_cross_entropy(
            seeded(TOKENS, FEATURES), seeded(CLASSES, FEATURES), freed(seeded_probabilities(TOKENS, CLASSES))
        )


@pytest.mark.parametrize("name", ["weight", "logit_bias"])
def test_class_weights_and_biases_freed_before_backward_raise(name):
    given = seeded(CLASSES).abs()
    leaf = seeded(TOKENS, CLASSES).requires_grad_()
    loss = fl.cross_entropy(leaf, seeded_ids(CLASSES, TOKENS), reduction="none", **{name: given}).sum()
    given.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        loss.backward()


def test_logits_freed_before_backward_raise():
    logits = seeded(TOKENS, CLASSES).requires_grad_() * 1
    loss = fl.cross_entropy(logits, seeded_ids(CLASSES, TOKENS), reduction="none").sum()
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^input has no memory"):
        loss.backward()


@pytest.mark.parametrize(("call", "name"), CASES)
def test_zero_tensors_are_zeros(call, name):
    function, given = CALLS[call][0], CALLS[call][1]()
    shape, dtype = given[name].shape, given[name].dtype
    expected = function(**given | {name: torch.zeros(shape, dtype=dtype)})
    got = function(**given | {name: zero(*shape, dtype=dtype)})
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_probabilities_of_zero_are_zeros():
    assert fl.cross_entropy(seeded(TOKENS, CLASSES), zero(TOKENS, CLASSES)) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_upstream_gradients_give_zeros(reduction):
    upstream = zero(*(() if reduction == "mean" else (TOKENS,)))
    target = seeded_ids(CLASSES, TOKENS)
    logits = seeded(TOKENS, CLASSES).requires_grad_()
    soft = seeded_probabilities(TOKENS, CLASSES).requires_grad_()
    hidden, weight = seeded(TOKENS, FEATURES).requires_grad_(), seeded(CLASSES, FEATURES).requires_grad_()
    sampled = {"backward": "sampled", "threshold": 0.5}
    losses = {
        "ids": (fl.cross_entropy(logits, target, reduction=reduction), (logits,)),
        "soft": (fl.cross_entropy(logits, soft, reduction=reduction), (logits, soft)),
        "linear": (fl.linear_cross_entropy(hidden, weight, target, reduction=reduction), (hidden, weight)),
        "sampled": (fl.linear_cross_entropy(hidden, weight, target, reduction=reduction, **sampled), (hidden, weight)),
        "sparse": (
            fl.linear_cross_entropy(hidden, weight, target, reduction=reduction, sparse=True, **sampled),
            (hidden, weight),
        ),
    }
    for loss, inputs in losses.values():
        for gradient in torch.autograd.grad(loss, inputs, upstream):
            assert not gradient.to_dense().any()
    logprob = fl.logit_stats(logits, target).logprob
    assert not torch.autograd.grad(logprob, logits, zero(TOKENS))[0].any()


def test_empty_tensors_need_no_memory():
    empty = torch.empty(0, CLASSES, requires_grad=True)
    assert empty.data_ptr() == 0
    loss = fl.cross_entropy(empty, torch.empty(0, dtype=torch.int64), reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0, CLASSES)
