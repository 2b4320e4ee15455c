# SPDX-License-Identifier: Apache-2.0
"""`fastloss.torch.cross_entropy` of logits and targets of every layout and integer type, and what it leaves as it was."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

import fastloss.torch  # noqa: E402
from torch_helpers import array, ids_of, run, same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

FLOAT64 = {"rtol": 1e-12, "atol": 1e-14}


# ---- layouts ----


def channels_last(shape):
    return seeded(*shape).to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels_last": lambda: channels_last((2, 5, 3, 4)),
    "transposed": lambda: seeded(3, 4, 5).transpose(1, 2),
    "sliced rows": lambda: seeded(8, 12)[::2, 3:9],
    "classes apart": lambda: seeded(4, 12)[:, ::2],
    "expanded": lambda: seeded(1, 6).expand(4, 6),
    "permuted": lambda: seeded(2, 3, 4, 5).permute(3, 1, 0, 2),
    "offset": lambda: seeded(41)[1:].view(5, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_every_layout_is_that_of_pytorch(soft, layout):
    base = LAYOUTS[layout]()
    target = seeded_probabilities(*base.shape) if soft else ids_of(tuple(base.shape))

    def with_grad(function):
        leaf = LAYOUTS[layout]().requires_grad_()
        function(leaf, target).backward()
        return leaf.grad

    torch.testing.assert_close(with_grad(fastloss.torch.cross_entropy), with_grad(F.cross_entropy), **FLOAT64)


def test_gradient_of_channels_last_logits_is_channels_last():
    logits = channels_last((2, 5, 3, 4)).requires_grad_()
    fastloss.torch.cross_entropy(logits, ids_of((2, 5, 3, 4))).backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint64])
def test_targets_of_any_integer_type_are_the_same(dtype):
    logits, target = seeded(6, 50), seeded_ids(50, 6)
    expected = fastloss.torch.cross_entropy(logits, target)
    assert same_bits(fastloss.torch.cross_entropy(logits, target.to(dtype)), expected)


def test_target_with_strides_is_taken_by_value():
    logits, wide = seeded(6, 50), seeded_ids(50, 6, 2)
    assert same_bits(
        fastloss.torch.cross_entropy(logits, wide[:, 1]), fastloss.torch.cross_entropy(logits, wide[:, 1].contiguous())
    )


def test_conjugate_and_negative_views_are_taken_by_value():
    negative = torch._neg_view(seeded(4, 5))
    target = seeded_ids(5, 4)
    assert same_bits(fastloss.torch.cross_entropy(negative, target), fastloss.torch.cross_entropy(-seeded(4, 5), target))


# ---- what must not change ----


# Liger #272, Unsloth #5002, Megatron PR #1594: logits overwritten behind the caller's back.
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_logits_and_target_are_not_written_unless_asked(soft):
    logits = seeded(6, 50).requires_grad_()
    target = seeded_probabilities(6, 50) if soft else seeded_ids(50, 6)
    before, target_before, version = logits.detach().clone(), target.clone(), logits._version
    fastloss.torch.cross_entropy(logits, target).backward()
    assert torch.equal(logits, before)
    assert torch.equal(target, target_before)
    assert logits._version == version


def test_numpy_and_pytorch_give_the_same_bits(device):
    if device != "cpu":
        pytest.skip("the bits of a GPU are its own")
    logits, target = seeded(6, 5000, dtype=torch.float32), seeded_ids(5000, 6)
    loss, gradient, _ = run(fastloss.torch.cross_entropy, logits, target, label_smoothing=0.1)
    numpy_loss, numpy_gradient = fastloss.cross_entropy(logits.numpy(), target.numpy(), label_smoothing=0.1, return_grad=True)
    assert array(loss).tobytes() == np.asarray(numpy_loss).tobytes()
    assert array(gradient).tobytes() == numpy_gradient.tobytes()


@pytest.mark.parametrize(("logits_grad", "target_grad"), list(itertools.product([False, True], [False, True])), ids=str)
def test_gradients_go_where_they_are_wanted_and_nowhere_else(logits_grad, target_grad):
    logits, target = seeded(4, 5).requires_grad_(logits_grad), seeded_probabilities(4, 5).requires_grad_(target_grad)
    loss = fastloss.torch.cross_entropy(logits, target)
    assert loss.requires_grad == (logits_grad or target_grad)
    if loss.requires_grad:
        loss.backward()
    assert (logits.grad is not None) == logits_grad
    assert (target.grad is not None) == target_grad


def test_no_grad_leaves_no_graph():
    logits = seeded(4, 5).requires_grad_()
    with torch.no_grad():
        assert not fastloss.torch.cross_entropy(logits, seeded_ids(5, 4)).requires_grad


def test_inference_mode_works():
    with torch.inference_mode():
        logits = seeded(4, 5)
        loss = fastloss.torch.cross_entropy(logits, seeded_ids(5, 4))
    torch.testing.assert_close(loss.clone(), F.cross_entropy(seeded(4, 5), seeded_ids(5, 4)), **FLOAT64)
