# SPDX-License-Identifier: Apache-2.0
"""The gradient over the logits, made in backward or in forward."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

ours = fastloss.torch.cross_entropy


# ---- in backward ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_inplace_gives_the_bits_of_fresh_memory(dtype, reduction):
    leaf, target = seeded(6, 5000, dtype=dtype).requires_grad_(), seeded_ids(5000, 6)
    (fresh,) = torch.autograd.grad(ours(leaf * 1, target, reduction=reduction).sum(), leaf)
    (inplace,) = torch.autograd.grad(ours(leaf * 1, target, reduction=reduction, inplace=True).sum(), leaf)
    if leaf.is_cuda:  # a loss without a gradient in its trip is added up in another order
        torch.testing.assert_close(inplace, fresh)
    else:
        assert same_bits(inplace, fresh)


def test_inplace_writes_the_gradient_over_the_logits_and_bumps_their_version():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    ours(logits, target, inplace=True).backward()
    assert seen == [address]
    assert logits._version > version
    assert torch.equal(logits.detach(), leaf.grad)


def test_inplace_leaves_the_logits_alone_until_backward():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    ours(logits, target, inplace=True)
    assert torch.equal(logits, leaf)


@pytest.mark.parametrize("order", ["before", "after"])
def test_inplace_on_logits_that_another_operation_saved_is_reported(order):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    if order == "before":
        other = logits.exp().sum() + (logits**2).sum()
        loss = ours(logits, target, inplace=True)
    else:
        loss = ours(logits, target, inplace=True)
        other = (logits**2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_on_an_operation_that_saved_its_output_is_reported():
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf.exp()  # backward needs the values that the gradient overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours(logits, seeded_ids(50, 6), inplace=True).backward()


def test_second_backward_of_inplace_raises():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    loss = ours(leaf * 1, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_inplace_on_a_leaf_that_needs_gradients_raises():
    leaf = seeded(6, 50).requires_grad_()
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        ours(leaf, seeded_ids(50, 6), inplace=True)


def test_inplace_without_gradients_leaves_the_logits_alone():
    logits = seeded(6, 50)
    before = logits.clone()
    ours(logits, seeded_ids(50, 6), inplace=True)
    with torch.no_grad():
        ours(logits, seeded_ids(50, 6), inplace=True)
    assert torch.equal(logits, before)


def test_inplace_with_double_backward_raises():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(ours(logits, target, inplace=True), leaf, create_graph=True)
    assert same_bits(logits, before)


def test_inplace_on_a_view_of_expanded_memory_raises():
    leaf, target = seeded(1, 50).requires_grad_(), seeded_ids(50, 6)
    expanded = (leaf * 1).expand(6, 50)
    with pytest.raises(ValueError, match="may share one place in memory"):
        ours(expanded, target, inplace=True)


def test_inplace_on_overlapping_strides_raises():
    memory = seeded(1, 50).requires_grad_() * 1
    with pytest.raises(ValueError, match="may share one place in memory"):
        ours(memory.as_strided((4, 6), (1, 1)), seeded_ids(6, 4), inplace=True)


# ---- in forward ----


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_in_forward_has_the_bits_of_fresh_memory(dtype, reduction):
    leaf, target = seeded(6, 5000, dtype=dtype).requires_grad_(), seeded_ids(5000, 6)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 5.0}
    fresh_loss = ours(leaf, target, **options)
    (fresh,) = torch.autograd.grad(fresh_loss, leaf)
    logits = leaf * 1
    loss = ours(logits, target, inplace="forward", **options)
    assert same_bits(loss, fresh_loss)
    assert same_bits(logits, fresh)
    (inplace,) = torch.autograd.grad(loss, leaf)
    assert same_bits(inplace, fresh)


def test_gradient_in_forward_takes_the_place_of_the_logits():
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf * 1
    version = logits._version
    loss = ours(logits, seeded_ids(50, 6), inplace="forward")
    assert logits._version > version
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [-1.7, 0.0, 1.0, 3.0])
def test_gradient_in_forward_is_multiplied_by_another_upstream_gradient(upstream, reduction):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    for _ in range(2):  # which the second time is expected
        loss, expected = (ours(leaf * 1, target, reduction=reduction, inplace=inplace) for inplace in ("forward", False))
        factors = upstream * torch.arange(1.0, 1.0 + loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results = [torch.autograd.grad(x, leaf, factors)[0] for x in (loss, expected)]
        torch.testing.assert_close(*results, rtol=1e-14, atol=1e-16)


def test_gradient_in_forward_of_nan_stays_nan_whatever_the_upstream_gradient():
    leaf, target = seeded(2, 5).requires_grad_(), seeded_ids(5, 2)
    logits = [leaf * torch.tensor([[float("nan")], [1.0]], dtype=leaf.dtype) for _ in range(2)]
    losses = [ours(x, target, inplace=inplace) for x, inplace in zip(logits, ("forward", False), strict=True)]
    forward, fresh = (torch.autograd.grad(loss * 0.0, x)[0] for loss, x in zip(losses, logits, strict=True))
    torch.testing.assert_close(forward, fresh, equal_nan=True)


def test_logits_that_another_operation_saved_are_reported_after_a_gradient_in_forward():
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf * 1
    other = (logits * logits).sum()
    loss = ours(logits, seeded_ids(50, 6), inplace="forward")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_second_backward_of_a_gradient_in_forward_raises():
    leaf = seeded(6, 50).requires_grad_()
    loss = ours(leaf * 1, seeded_ids(50, 6), inplace="forward")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_in_forward_cannot_be_differentiated():
    leaf = seeded(6, 50).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(ours(leaf * 1, seeded_ids(50, 6), inplace="forward"), leaf, create_graph=True)


def test_gradient_in_forward_needs_logits_that_may_go():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="leaf"):
        ours(leaf, target, inplace="forward")
    soft = seeded_probabilities(6, 50).requires_grad_()
    with pytest.raises(ValueError, match="target"):
        ours(leaf.detach() * 1, soft, inplace="forward")
    with pytest.raises(ValueError, match="inplace='backward'"):
        ours(leaf * 1, target, inplace="backward")
    with torch.no_grad():
        ours(leaf, target, inplace="forward")
    assert torch.equal(leaf, before)


def test_inplace_with_a_gradient_for_soft_targets_is_right():
    logits, target = seeded(6, 50), seeded_probabilities(6, 50)
    results = []
    for inplace in (False, True):
        leaf, soft = logits.clone().requires_grad_(), target.clone().requires_grad_()
        results.append(torch.autograd.grad(ours(leaf * 1, soft, inplace=inplace), (leaf, soft)))
    for fresh, over in zip(*results, strict=True):
        assert same_bits(fresh, over)
