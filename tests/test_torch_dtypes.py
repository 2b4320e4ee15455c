# SPDX-License-Identifier: Apache-2.0
"""The four dtypes on tensors: what comes back, how exact it is, and what is not copied."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import fastloss.torch  # noqa: E402
import rows  # noqa: E402
from helpers import DTYPES, assert_cross_entropy_contract  # noqa: E402
from torch_helpers import TORCH_DTYPES, array, seeded, seeded_ids, seeded_probabilities  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")


def tensor_of(values):
    if values.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_is_of_the_accumulation_type_and_gradient_of_that_of_the_logits(reduction, dtype):
    logits = seeded(4, 5, dtype=TORCH_DTYPES[dtype]).requires_grad_()
    loss = fastloss.torch.cross_entropy(logits, seeded_ids(5, 4), reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert logits.grad.dtype == logits.dtype


# bf16 PyTorch is up to 8 % off here; the comparison is float64.
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("kind", rows.KINDS)
@pytest.mark.parametrize("classes", [2, 1000, 32000])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_loss_and_gradient_of_autograd_are_within_the_bound(inplace, classes, kind, dtype):
    values, target = rows.logits_and_target(kind, classes, dtype)
    leaf = tensor_of(values).requires_grad_()
    logits = leaf * 1
    loss = fastloss.torch.cross_entropy(logits, torch.from_numpy(target), reduction="none", inplace=inplace)
    loss.sum().backward()
    assert_cross_entropy_contract(array(loss), array(leaf.grad), values, target, reduction="none")


@pytest.mark.parametrize("target_dtype", TORCH_DTYPES)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_probabilities_and_their_gradient_may_have_any_dtype(dtype, target_dtype):
    logits = seeded(4, 300, dtype=TORCH_DTYPES[dtype]).requires_grad_()
    target = seeded_probabilities(4, 300).to(TORCH_DTYPES[target_dtype]).requires_grad_()
    loss = fastloss.torch.cross_entropy(logits, target)
    loss.backward()
    assert target.grad.dtype == target.dtype
    taken = array(target).astype(array(loss).dtype)
    assert_cross_entropy_contract(array(loss), array(logits.grad), array(logits), taken)


@pytest.mark.parametrize("weight_dtype", TORCH_DTYPES)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_may_have_any_dtype(dtype, weight_dtype):
    logits, target = seeded(4, 30, dtype=TORCH_DTYPES[dtype]), seeded_ids(30, 4)
    weight = (1 + torch.arange(30) % 4).to(TORCH_DTYPES[weight_dtype])
    loss = fastloss.torch.cross_entropy(logits, target, weight)
    expected = fastloss.torch.cross_entropy(logits, target, weight.to(loss.dtype))
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast_regions_change_no_dtype_and_no_bit(dtype):
    logits, target = seeded(4, 300, dtype=TORCH_DTYPES[dtype]), seeded_ids(300, 4)
    expected = fastloss.torch.cross_entropy(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastloss.torch.cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
