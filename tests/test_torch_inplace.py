# SPDX-License-Identifier: Apache-2.0
"""The gradient over the logits, made in the trip of the loss or in backward."""

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

ours = fastloss.torch.cross_entropy
ways = pytest.mark.parametrize("inplace", [True, "backward"], ids=["at once", "in backward"])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@ways
def test_inplace_gives_the_bits_of_fresh_memory(inplace, dtype, reduction):
    leaf, target = seeded(6, 5000, dtype=dtype).requires_grad_(), seeded_ids(5000, 6)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 5.0}
    (fresh,) = torch.autograd.grad(ours(leaf * 1, target, **options).sum(), leaf)
    (over,) = torch.autograd.grad(ours(leaf * 1, target, **options, inplace=inplace).sum(), leaf)
    if leaf.is_cuda and inplace == "backward":  # a loss without a gradient in its trip is added up in another order
        torch.testing.assert_close(over, fresh)
    else:
        assert same_bits(over, fresh)


@ways
def test_inplace_writes_the_gradient_over_the_logits_and_bumps_their_version(inplace):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    ours(logits, target, inplace=inplace).backward()
    assert seen == [address]
    assert logits._version > version
    assert torch.equal(logits.detach(), leaf.grad)


def test_gradient_is_in_place_once_the_loss_is_there():
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    version = logits._version
    loss = ours(logits, target, inplace=True)
    assert logits._version > version
    loss.backward()
    assert torch.equal(logits, leaf.grad)


def _which_could_not_be_made_at_once():
    def probabilities():
        return seeded_probabilities(6, 50).requires_grad_()

    return {
        "as asked for": lambda: (seeded(6, 50), seeded_ids(50, 6), {"inplace": "backward"}),
        "float16": lambda: (seeded(6, 50, dtype=torch.float16), seeded_ids(50, 6), {"inplace": True}),
        "no reduction": lambda: (seeded(6, 50), seeded_ids(50, 6), {"inplace": True, "reduction": "none"}),
        "gradient by the target": lambda: (seeded(6, 50), probabilities(), {"inplace": True}),
    }


@pytest.mark.parametrize("case", _which_could_not_be_made_at_once())
def test_logits_stay_until_backward(case):
    leaf, target, options = _which_could_not_be_made_at_once()[case]()
    leaf.requires_grad_()
    logits = leaf * 1
    loss = ours(logits, target, **options).sum()
    assert torch.equal(logits, leaf)
    loss.backward()
    assert torch.equal(logits, leaf.grad)


@pytest.mark.parametrize(("order", "inplace"), [("before", True), ("before", "backward"), ("after", "backward")])
def test_inplace_on_logits_that_another_operation_saved_is_reported(order, inplace):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    logits = leaf * 1
    if order == "before":
        other = logits.exp().sum() + (logits**2).sum()
        loss = ours(logits, target, inplace=inplace)
    else:
        loss = ours(logits, target, inplace=inplace)
        other = (logits**2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@ways
def test_inplace_on_an_operation_that_saved_its_output_is_reported(inplace):
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf.exp()  # backward needs the values that the gradient overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours(logits, seeded_ids(50, 6), inplace=inplace).backward()


@ways
def test_two_losses_over_the_same_logits_are_reported(inplace):
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf * 1
    loss = ours(logits, seeded_ids(50, 6), inplace=inplace) + ours(logits, seeded_ids(50, 6), inplace=inplace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ways
def test_second_backward_of_inplace_raises(inplace):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    loss = ours(leaf * 1, target, inplace=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ways
def test_inplace_on_a_leaf_that_needs_gradients_raises(inplace):
    leaf = seeded(6, 50).requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="leaf"):
        ours(leaf, seeded_ids(50, 6), inplace=inplace)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("word", ["forward", "", 1, None])
def test_inplace_takes_no_other_word(word):
    target, message = seeded_ids(50, 6), f"inplace must be .*, got {word!r}"
    for logits in (seeded(6, 50), seeded(6, 50).requires_grad_() * 1):
        with pytest.raises(ValueError, match=message):
            ours(logits, target, inplace=word)
    with pytest.raises(ValueError, match=message):
        fastloss.torch.CrossEntropyLoss(inplace=word)


@pytest.mark.parametrize("before", [1e-60, 1e60, -1e-40, 2.0**30])
def test_an_extreme_upstream_gradient_of_another_loss_leaves_no_trace(before):
    target = seeded_ids(50, 6)
    learnt = fastloss.torch.cross_entropy(seeded(6, 50).double().requires_grad_(), target)
    learnt.backward(torch.tensor(before, dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16):
        leaf = (8 * seeded(6, 50)).to(dtype).requires_grad_()
        gradients = [torch.autograd.grad(ours(leaf * 1, target, inplace=way), leaf)[0] for way in (False, True)]
        torch.testing.assert_close(*gradients, rtol=2**-7, atol=0.0)


def test_logits_without_elements_are_overwritten():
    logits = torch.randn(2, 0, 3).movedim(0, -1).requires_grad_() * 1
    loss = ours(logits, torch.zeros(0, 2, dtype=torch.long), dim=1, inplace=True, reduction="sum")
    loss.backward()
    assert loss == 0


@ways
def test_inplace_without_gradients_leaves_the_logits_alone(inplace):
    logits = seeded(6, 50)
    before = logits.clone()
    ours(logits, seeded_ids(50, 6), inplace=inplace)
    with torch.no_grad():
        ours(logits.requires_grad_(), seeded_ids(50, 6), inplace=inplace)
    assert torch.equal(logits, before)


@ways
def test_inplace_with_double_backward_raises(inplace):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    loss = ours(leaf * 1, target, inplace=inplace)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@ways
@pytest.mark.parametrize("reentrant", [False, True])
def test_inplace_under_checkpointing(reentrant, inplace):
    target = seeded_ids(50, 6)

    def head(hidden, inplace):
        return ours(hidden * 2, target, inplace=inplace)

    plain, kept = (seeded(6, 50).requires_grad_() for _ in range(2))
    head(plain, False).backward()
    checkpoint(head, kept, inplace, use_reentrant=reentrant).backward()
    torch.testing.assert_close(kept.grad, plain.grad)


def test_inplace_on_a_view_of_expanded_memory_raises():
    leaf, target = seeded(1, 50).requires_grad_(), seeded_ids(50, 6)
    expanded = (leaf * 1).expand(6, 50)
    with pytest.raises(ValueError, match="may share one place in memory"):
        ours(expanded, target, inplace=True)


def test_inplace_on_overlapping_strides_raises():
    memory = seeded(1, 50).requires_grad_() * 1
    with pytest.raises(ValueError, match="may share one place in memory"):
        ours(memory.as_strided((4, 6), (1, 1)), seeded_ids(6, 4), inplace=True)


@ways
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [-1.7, 0.0, 1.0, 3.0])
def test_inplace_follows_another_upstream_gradient(upstream, reduction, inplace):
    leaf, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    for _ in range(2):  # which the second time is expected
        loss, expected = (ours(leaf * 1, target, reduction=reduction, inplace=way) for way in (inplace, False))
        factors = upstream * torch.arange(1.0, 1.0 + loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results = [torch.autograd.grad(x, leaf, factors)[0] for x in (loss, expected)]
        torch.testing.assert_close(*results, rtol=1e-14, atol=1e-16)


@ways
def test_inplace_gradient_of_nan_stays_nan_whatever_the_upstream_gradient(inplace):
    leaf, target = seeded(2, 5).requires_grad_(), seeded_ids(5, 2)
    logits = [leaf * torch.tensor([[float("nan")], [1.0]], dtype=leaf.dtype) for _ in range(2)]
    losses = [ours(x, target, inplace=way) for x, way in zip(logits, (inplace, False), strict=True)]
    over, fresh = (torch.autograd.grad(loss * 0.0, x)[0] for loss, x in zip(losses, logits, strict=True))
    torch.testing.assert_close(over, fresh, equal_nan=True)


@ways
def test_inplace_with_a_gradient_for_soft_targets_is_right(inplace):
    logits, target = seeded(6, 50), seeded_probabilities(6, 50)
    results = []
    for way in (False, inplace):
        leaf, soft = logits.clone().requires_grad_(), target.clone().requires_grad_()
        results.append(torch.autograd.grad(ours(leaf * 1, soft, inplace=way), (leaf, soft)))
    for fresh, over in zip(*results, strict=True):
        assert same_bits(fresh, over)
