# SPDX-License-Identifier: Apache-2.0
"""Chunks and sums of linear cross-entropy of CUDA tensors, over the emulated module: sizes, types, which are left out."""

import contextlib

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from cuda_linear_helpers import TOKENS, TOLERANCE, assert_near, expected, factors, ids  # noqa: E402
from fastloss.torch import linear_ops  # noqa: E402
from fastloss.torch.projection import NOTHING  # noqa: E402


@pytest.fixture
def projection(linear):
    from fastloss.torch import cuda_projection

    return cuda_projection


class Arrived:
    """The number of tokens that count."""

    def __init__(self, counts):
        self.counts = counts

    def wait(self):
        return int(self.counts.sum())


def after_a_call_that_ignored_some(counts):
    return True, Arrived(counts)


def in_the_first_call(counts):
    return True, None


def where_none_was_ever_ignored(counts):
    return False, None


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_leaving_out_chunks_without_counted_tokens_changes_no_bit(backward, projection, monkeypatch):
    made, target = factors(torch.float32), ids(every=2)
    made_chunks = []
    logits = projection.Projection.logits

    def seen(self, tokens):
        made_chunks[-1] += 1
        return logits(self, tokens)

    monkeypatch.setattr(projection.Projection, "logits", seen)

    results = []
    for expected_of in (in_the_first_call, after_a_call_that_ignored_some):
        made_chunks.append(0)
        monkeypatch.setattr(projection, "_expected", expected_of)
        options = {"linear_bias": made[2], "chunk_tokens": 4, "backward": backward, "seed": 1, "threshold": 1 / 8}
        loss = fl.linear_cross_entropy(*made[:2], target, **options)
        losses = fl.linear_cross_entropy(*made[:2], target, reduction="none", **options)
        results.append((loss, losses, *torch.autograd.grad(loss, made), *torch.autograd.grad(losses.sum(), made)))
    assert made_chunks[1] < made_chunks[0]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_order_of_tokens_changes_nothing_but_the_last_bits(backward, projection, monkeypatch):
    made, target = factors(torch.float32), ids(every=2)
    with torch.no_grad():
        made[0][target == -100] = torch.nan
    options = {"linear_bias": made[2], "backward": backward, "seed": 1, "threshold": 1 / 8}
    results = []
    for expected_of in (where_none_was_ever_ignored, after_a_call_that_ignored_some):
        monkeypatch.setattr(projection, "_expected", expected_of)
        losses = fl.linear_cross_entropy(*made[:2], target, reduction="none", **options)
        results.append([losses, *torch.autograd.grad(losses.sum(), made)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.isfinite().all()


def test_default_chunks_are_made_for_the_tokens_that_count(projection, monkeypatch):
    made, target = factors(bias=False), ids(every=2)
    made_chunks = []
    logits = projection.Projection.logits
    monkeypatch.setattr(
        projection.Projection, "logits", lambda self, tokens: made_chunks.append(tokens) or logits(self, tokens)
    )
    monkeypatch.setattr(projection, "_expected", after_a_call_that_ignored_some)
    loss = fl.linear_cross_entropy(*made, target)
    gradients = torch.autograd.grad(loss, made)
    assert [chunk.stop for chunk in made_chunks] == [TOKENS // 2]
    monkeypatch.undo()
    exact, expected_gradients = expected(made, target)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    for ours, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


def test_tokens_are_put_in_order_once_some_were_ignored_and_the_host_asks_after_a_call_that_ignored_some(
    projection, monkeypatch
):
    monkeypatch.undo()  # the functions that decide, over a count that needs no GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(projection, "_last", {})
    monkeypatch.setattr(projection, "_ignoring", set())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    class Count:
        def __init__(self, counts):
            self.all = bool(counts.all())

        def is_all(self):
            return self.all

    monkeypatch.setattr(projection, "Count", Count)
    everything, some = torch.ones(4, dtype=torch.bool), torch.tensor([True, False])

    def seen(counts):
        ordered, count = projection._expected(counts)
        return ordered, count is not None

    assert [seen(everything) for _ in range(3)] == [(True, False), (False, False), (False, False)]
    calls = (some, some, everything, everything)
    assert [seen(counts) for counts in calls] == [(False, False), (True, True), (True, True), (True, False)]
    seen(some)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert seen(some) == (True, False)


def test_weight_sum_is_float32_over_several_chunks_and_rounded_once(projection):
    made, target = factors(torch.bfloat16, bias=False), ids()
    head = linear_ops.Head(*(factor.detach() for factor in made), None, 4)
    made_here = projection.Projection(*head, NOTHING._replace(weight=True))
    assert made_here._sum_weight.dtype == torch.float32
    by_weight = torch.autograd.grad(fl.linear_cross_entropy(*made, target, chunk_tokens=4), made[1])[0]
    assert by_weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("unsplit", "sums"), [(0, torch.bfloat16), (1 << 24, torch.float32)], ids=["large", "small"])
def test_one_large_product_is_rounded_at_once_and_a_small_one_summed_in_float32(unsplit, sums, projection, monkeypatch):
    monkeypatch.setattr(projection, "_UNSPLIT", unsplit)
    made, target = factors(torch.bfloat16, bias=False), ids()
    head = linear_ops.Head(*(factor.detach() for factor in made), None, None)
    assert projection.Projection(*head, NOTHING._replace(weight=True))._sum_weight.dtype == sums
    _, gradients = expected(made, target)
    for ours, gradient in zip(torch.autograd.grad(fl.linear_cross_entropy(*made, target), made), gradients, strict=True):
        assert_near(ours, gradient, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("tokens", "classes", "features", "size"),
    [
        (4096, 128256, 4096, 4096),  # no more logits than a float32 sum of several chunks would take
        (8192, 256000, 2304, 2048),  # as many as the weight has numbers
        (8192, 256000, 0, 1024),  # 512 MiB where no gradient is rounded
        (100, 50, 0, 100),
        (0, 9, 3, 1),
    ],
)
def test_chunks_are_even_and_of_whole_tiles(tokens, classes, features, size, projection):
    token_bytes, rounded_bytes = 2 * classes, 2 * classes * features
    assert projection.chunk_size(None, tokens, token_bytes, rounded_bytes) == size
    assert projection.chunk_size(7, tokens, token_bytes, rounded_bytes) == min(7, max(1, tokens))
