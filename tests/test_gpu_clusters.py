# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of long rows on a GPU, each shared by a cluster of blocks."""

import pytest

torch = pytest.importorskip("torch")

from fastloss._options import MEAN, NONE  # noqa: E402
from fastloss.torch import ops  # noqa: E402
from helpers import assert_cross_entropy_contract  # noqa: E402
from reference import Options  # noqa: E402
from torch_helpers import TORCH_DTYPES, array  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def long_rows(blocks, dtype):
    """Logits for which clusters of so many blocks fill the GPU, and targets."""
    from fastloss import _cuda
    from fastloss.torch.cuda import where

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    if torch.cuda.get_device_capability() < (9, 0) or multiprocessors < 8 * blocks:
        pytest.skip("needs a GPU with such clusters")
    rows, classes = multiprocessors // blocks, 140_001
    logits = (3 * torch.randn(rows, classes, device="cuda")).to(dtype)
    described = ops.describe(logits, 1)
    parts, one_trip = _cuda.plan(described, described, *where(logits))[1:3]
    assert parts > 1
    assert one_trip
    return logits, torch.randint(classes, (rows,), device="cuda")


@pytest.mark.parametrize(("blocks", "options"), [(2, {}), (5, {}), (8, {}), (8, {"label_smoothing": 0.1, "softcap": 20.0})])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_gpu_makes_loss_and_gradient_of_long_rows_in_clusters(dtype, blocks, options):
    logits, target = long_rows(blocks, TORCH_DTYPES[dtype])
    before, gradient = logits.clone(), torch.full_like(logits, float("nan"))
    arguments = (target, None, None, ops.Options(1, **options), MEAN, None, False)
    loss, *_ = ops.cross_entropy(logits, *arguments, gradient)
    again, *_ = ops.cross_entropy(logits, *arguments, logits)
    assert torch.equal(again, loss)
    assert torch.equal(logits, gradient)
    assert_cross_entropy_contract(array(loss), array(gradient), array(before), array(target), Options(**options))


@pytest.mark.parametrize(("classes", "blocks"), [(70_001, 3), (150_001, 5), (170_001, 6)])
def test_gpu_clusters_take_several_rows_one_after_the_other(classes, blocks):
    """The next row comes while a cluster writes the last one; rows begin anywhere, and some of them are ignored."""
    from fastloss import _cuda
    from fastloss.torch.cuda import where

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    if torch.cuda.get_device_capability() < (9, 0) or multiprocessors < 8 * blocks:
        pytest.skip("needs a GPU with such clusters")
    rows = 24 * multiprocessors
    logits = (3 * torch.randn(rows, classes + 1, device="cuda", dtype=torch.bfloat16))[:, 1:]
    described = ops.describe(logits, 1)
    _, parts, one_trip, turns = _cuda.plan(described, described, *where(logits))
    assert one_trip
    assert parts > 1
    assert turns > 1
    target = torch.randint(classes, (rows,), device="cuda")
    target[::7] = -100
    losses, gradient = one_trip_of(logits, target)
    for begin in range(0, rows, 600):  # so few rows that a cluster takes one
        part = slice(begin, begin + 600)
        of_part = one_trip_of(logits[part], target[part])
        torch.testing.assert_close((losses[part], gradient[part]), of_part, rtol=2**-7, atol=1e-30)
    some = torch.arange(0, rows, rows // 12, device="cuda")
    found = (array(tensor[some]) for tensor in (losses, gradient, logits, target))
    assert_cross_entropy_contract(*found, reduction="none")


def one_trip_of(logits, target):
    """The loss of each row and its gradient."""
    gradient = torch.full_like(logits, float("nan"))
    return ops.cross_entropy(logits, target, None, None, ops.Options(1), NONE, None, False, gradient)[0], gradient


def test_gpu_graph_replays_clusters():
    logits, target = long_rows(8, torch.bfloat16)
    gradient = torch.empty_like(logits)

    def one_trip():
        return ops.cross_entropy(logits, target, None, None, ops.Options(1), MEAN, None, False, gradient)[0]

    expected, expected_gradient = one_trip(), gradient.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = one_trip()
    gradient.zero_()
    graph.replay()
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
