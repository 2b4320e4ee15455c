# SPDX-License-Identifier: Apache-2.0
"""Autograd and the systems around it over `fastloss.torch.linear_cross_entropy`: transforms, compilation, checkpoints."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch  # noqa: E402
from fastloss.torch import linear_ops  # noqa: E402
from linear_helpers import (  # noqa: E402
    CLASSES,
    FEATURES,
    FLOAT64,
    OPTIONS,
    TOKENS,
    assert_same_gradients,
    factors,
    on_each_device,
    reference,
    targets,
)
from torch_helpers import here, same_bits, seeded, seeded_ids  # noqa: E402

ours = fastloss.torch.linear_cross_entropy


@on_each_device
def test_a_second_backward_gives_the_same_and_leaves_the_first_alone():
    hidden, weight, bias = factors()
    loss = ours(hidden, weight, targets("ignored"), linear_bias=bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # who owns a gradient may change it
    for again, copy in zip(torch.autograd.grad(loss, (hidden, weight, bias)), copies, strict=True):
        torch.testing.assert_close(again, copy, **FLOAT64)


def test_gradients_accumulate_into_existing_ones_and_are_taken_over_without_a_copy():
    hidden, weight, _ = factors(torch.float32, 64, 40000, 32)
    target = targets("ids", 64, 40000)
    ours(hidden, weight, target).backward()
    once = weight.grad.clone()
    place = weight.grad.data_ptr()
    ours(hidden, weight, target).backward()
    assert weight.grad.data_ptr() == place
    torch.testing.assert_close(weight.grad, 2 * once)
    weight.grad = None
    fastloss.release_memory()
    ours(hidden, weight, target).backward()
    logits = 64 * 40000 * 4
    # The logits' memory is kept for the next call; that of the gradient is in use, and no copy was made of it.
    assert logits <= fastloss.release_memory() < logits + weight.nbytes


@on_each_device
def test_tied_weights_get_both_gradients():
    embedding = seeded(CLASSES, FEATURES).requires_grad_()
    ids = targets("ids")
    loss = ours(torch.tanh(embedding[ids]), embedding, ids.roll(1))
    expected = reference(torch.tanh(embedding[ids]), embedding, None, ids.roll(1))
    assert_same_gradients(loss, expected, (embedding,))


@on_each_device
def test_weight_of_any_strides():
    hidden, weight, _ = factors()
    for strided in (weight.detach().t().contiguous().t(), torch.stack([weight.detach()] * 2, 1)[:, 0]):
        leaf = strided.requires_grad_()
        for options in ({}, {"backward": "sampled", "seed": 1, "threshold": 0.01}):
            loss = ours(hidden, leaf, targets("ids"), **options)
            dense = ours(hidden, weight, targets("ids"), **options)
            torch.testing.assert_close(loss, dense, **FLOAT64)
            got, expected = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(dense, weight)[0]
            torch.testing.assert_close(got, expected, **FLOAT64)


@on_each_device
@pytest.mark.parametrize("kind", ["ids", "ignored", "soft"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, OPTIONS["extras"]], ids=["mean", "none", "extras"])
def test_first_and_second_derivatives(options, kind):
    inputs = [f.detach()[:6, :3].clone().requires_grad_() if f.ndim > 1 else None for f in factors()]
    hidden, weight = inputs[:2]
    bias = seeded(6, seed=2).requires_grad_()
    target = targets(kind, 6, 6)
    options = {k: v[:6] if isinstance(v, torch.Tensor) else v for k, v in here(options).items()}

    def loss(hidden, weight, bias, *soft):
        return ours(hidden, weight, soft[0] if soft else target, linear_bias=bias, **options)

    variables = (hidden, weight, bias, *((target.requires_grad_(),) if kind == "soft" else ()))
    # On a GPU the first call that ignores tokens adds up in another order than those behind it.
    tolerance = {"nondet_tol": 1e-12 if hidden.is_cuda else 0.0}
    assert torch.autograd.gradcheck(loss, variables, **tolerance)
    assert torch.autograd.gradgradcheck(loss, variables, **tolerance)


@on_each_device
def test_torch_func_and_vmap():
    hidden, weight, bias = (f.detach() for f in factors())
    target, batch, ids = targets("ignored"), seeded(3, TOKENS, FEATURES), seeded_ids(CLASSES, 3, TOKENS)
    arguments = (hidden, weight, bias)
    grads = torch.func.grad(lambda h, w, b: ours(h, w, target, linear_bias=b), (0, 1, 2))(*arguments)
    expected = torch.func.grad(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target), (0, 1, 2))(*arguments)
    torch.testing.assert_close(grads, expected, **FLOAT64)
    for reduction in ("mean", "none"):

        def mine(h, y, reduction=reduction):
            return ours(h, weight, y, reduction=reduction).sum()

        def theirs(h, y, reduction=reduction):
            return F.cross_entropy(F.linear(h, weight), y, reduction=reduction).sum()

        torch.testing.assert_close(torch.vmap(mine)(batch, ids), torch.vmap(theirs)(batch, ids), **FLOAT64)
        got, wanted = (torch.vmap(torch.func.grad(f))(batch, ids) for f in (mine, theirs))
        torch.testing.assert_close(got, wanted, **FLOAT64)
        got, wanted = (torch.func.jacrev(torch.func.jacrev(f))(batch[0], ids[0]) for f in (mine, theirs))
        torch.testing.assert_close(got, wanted, **FLOAT64)


@on_each_device
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backward": "sampled", "seed": 3}], ids=str)
def test_compiled_in_one_graph_it_gives_the_same_bits(options):
    target = targets("ignored")

    def loss(hidden, weight, bias):
        # With a size of chunks, on a GPU too bits do not depend on the calls before.
        return ours(hidden * 2, weight, target, linear_bias=bias, chunk_tokens=5, **options).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    variables = factors()
    pairs = [torch.autograd.grad(f(*variables), variables) for f in (compiled, loss)]
    assert all(same_bits(one, other) for one, other in zip(*pairs, strict=True))
    torch._dynamo.reset()


@on_each_device
def test_autocast_multiplies_in_its_dtype():
    hidden, weight, bias = factors(torch.float32)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = ours(hidden, weight, targets("ids"), linear_bias=bias)
    low = [f.bfloat16() for f in (hidden, weight, bias)]
    assert same_bits(loss, ours(low[0], low[1], targets("ids"), linear_bias=low[2]))
    loss.backward()
    assert weight.grad.dtype == torch.float32


@on_each_device
def test_autocast_leaves_float64_alone():
    hidden, weight, bias = factors(torch.float64)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = ours(hidden, weight, targets("ids"), linear_bias=bias)
        with pytest.raises(TypeError, match="linear_weight must have the dtype of input, float64, got float32"):
            ours(hidden, weight.float(), targets("ids"))
    assert same_bits(loss, ours(hidden, weight, targets("ids"), linear_bias=bias))


@on_each_device
def test_checkpoints():
    hidden, weight, _ = factors()
    target = targets("ids")
    for reentrant in (False, True):
        loss = checkpoint(lambda h, w: ours(h * 2, w, target), hidden, weight, use_reentrant=reentrant)
        assert_same_gradients_of_checkpoint(loss, (hidden, weight))


def assert_same_gradients_of_checkpoint(loss, leaves):
    hidden, weight = leaves
    hidden.grad = weight.grad = None
    loss.backward()
    expected = torch.autograd.grad(reference(hidden * 2, weight, None, targets("ids")), leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, **FLOAT64)


def test_an_exception_in_a_later_chunk_leaves_no_gradient(monkeypatch):
    hidden, weight, _ = factors()

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(linear_ops.ops, "cross_entropy", fail)
    with pytest.raises(MemoryError):
        ours(hidden, weight, targets("ids"))
    assert hidden.grad is None
    assert weight.grad is None
