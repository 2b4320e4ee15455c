# SPDX-License-Identifier: Apache-2.0
"""The matrix products of linear cross-entropy: which of them are made, by which library, and to which bits."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch  # noqa: E402
from fastloss.torch import matmul  # noqa: E402
from fastloss.torch.projection import Projection  # noqa: E402
from linear_helpers import CLASSES, assert_same_gradients, factors, reference, targets  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids  # noqa: E402

ours = fastloss.torch.linear_cross_entropy


# ---- work and memory ----


def test_logits_of_one_chunk_at_most_are_made_at_a_time(monkeypatch):
    seen = []
    logits = Projection.logits

    def watched(self, tokens):
        out = logits(self, tokens)
        seen.append(out.shape[0])
        return out

    monkeypatch.setattr(Projection, "logits", watched)
    hidden, weight, _ = factors()
    ours(hidden, weight, targets("ids"), chunk_tokens=4).backward()
    assert seen == [4, 4, 4, 1]  # each of them once: backward makes none


def test_ignored_tokens_are_not_multiplied(monkeypatch):
    rows = []
    product = matmul.logits_product
    monkeypatch.setattr(matmul, "logits_product", lambda hidden, *rest: (rows.append(len(hidden)), product(hidden, *rest)))
    hidden, weight, _ = factors(tokens=100)
    target = targets("ignored", tokens=100)
    ours(hidden, weight, target)
    assert rows == [int((target != -100).sum())]


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_that_nobody_needs_are_not_made(monkeypatch, needed, reduction):
    made = []
    for name in ("hidden_product", "weight_product"):
        product = getattr(matmul, name)
        monkeypatch.setattr(matmul, name, lambda *a, name=name, product=product, **k: (made.append(name), product(*a, **k)))
    hidden, weight, _ = factors()
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    loss = ours(hidden, weight, targets("ids"), reduction=reduction)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.sum().backward()
    assert set(made) == {name for name, need in zip(("hidden_product", "weight_product"), needed, strict=True) if need}


def test_without_gradients_forward_alone_is_done():
    hidden, weight, _ = factors()
    with torch.no_grad():
        loss = ours(hidden, weight, targets("ids"))
    assert not loss.requires_grad
    assert same_bits(loss, ours(hidden, weight, targets("ids")).detach())


def without_bfloat16(monkeypatch):
    """As on a CPU that does not multiply bfloat16 itself."""
    monkeypatch.setattr(matmul, "_BLOCKS", None)


def product_and_scale(left, right):
    """In float64; errors of sums are measured by the same product of magnitudes."""
    left, right = left.double(), right.double()
    return left @ right, left.abs() @ right.abs()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("classes", [70, 1003])  # from 1,000 on, PyTorch multiplies bfloat16 where the CPU does
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_the_product_rounded_once(dtype, classes, with_bias):
    hidden, weight = seeded(21, 40, dtype=dtype), seeded(classes, 40, seed=1, dtype=dtype)
    bias = seeded(classes, seed=2, dtype=dtype) if with_bias else None
    found = torch.full((21, classes), torch.nan, dtype=dtype)
    matmul.logits_product(hidden, weight, bias, found)
    added = 0 if bias is None else bias.double()
    exact, scale = product_and_scale(hidden, weight.t())
    exact, scale = exact + added, scale + abs(added)
    unit, rounding = 2.0 ** (-52 if dtype == torch.float64 else -23), torch.finfo(dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= 41 * unit * scale + 1.01 * rounding * exact.abs()).all())


# Our own product takes a bias by its pointer.
@pytest.mark.parametrize("strides", ["every third", "expanded", "of a place"])
def test_a_bias_of_any_strides(strides):
    hidden, weight, bias = factors(torch.float32)
    bias = {
        "every third": seeded(3 * CLASSES, scale=1.0, dtype=torch.float32)[::3],
        "expanded": bias[:1].detach().expand(CLASSES),
        "of a place": seeded(CLASSES, 4, scale=1.0, dtype=torch.float32)[:, 1],
    }[strides].requires_grad_()
    target = targets("ids")
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    for options in ({}, {"chunk_tokens": 4}, {"reduction": "none"}):
        loss = ours(hidden, weight, target, linear_bias=bias, **options)
        options.pop("chunk_tokens", None)
        expected = reference(hidden, weight, bias, target, **options)
        assert_same_gradients(loss, expected, (hidden, weight, bias), tolerance=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden, weight, target, linear_bias=bias, backward="sampled"), expected.mean())
    stats = fastloss.torch.linear_logit_stats(hidden, weight, target, bias=bias, want="logprob")
    torch.testing.assert_close(-stats.logprob, expected, **tolerance)


@pytest.fixture(params=["float32", "float64", "float16", "bfloat16", "bfloat16 by ourselves"])
def dtype(request, monkeypatch):
    """Of factors; bfloat16 also as on a CPU without instructions for it."""
    if request.param.endswith("ourselves"):
        without_bfloat16(monkeypatch)
    return getattr(torch, request.param.split()[0])


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 129, 65), (32, 300, 64), (33, 128, 200), (2049, 130, 70)], ids=str)
def test_weight_products_are_rounded_once(dtype, shape, monkeypatch):
    tokens, classes, features = shape
    monkeypatch.setattr(matmul, "_BLOCK_BYTES", 4 * features * 50)  # blocks of fifty classes
    grad = seeded(tokens, classes + 3, dtype=dtype)[:, :classes]  # rows with a stride
    hidden = seeded(tokens, features, seed=1, dtype=dtype)
    total, out = torch.empty(classes, features), torch.zeros(classes, features, dtype=dtype)
    exact, scale = product_and_scale(grad.t(), hidden)
    sums, unit = (total if dtype.itemsize == 2 else out), 2.0 ** (-52 if dtype == torch.float64 else -23)
    for times in (1, 2):
        matmul.weight_product(grad, hidden, total, out, add=times > 1, last=times > 1)
        assert bool(((sums.double() - times * exact).abs() <= times * tokens * unit * scale).all())
    if sums is total:
        assert same_bits(out, total.to(dtype))
    at_once = torch.empty_like(out)
    matmul.weight_product(grad, hidden, None, at_once, add=False, last=True)
    matmul.weight_product(grad, hidden, total, out, add=False, last=True)
    assert same_bits(at_once, out)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 129, 65), (33, 300, 64)], ids=str)
def test_hidden_products_are_rounded_once(dtype, shape):
    tokens, classes, features = shape
    grad = seeded(tokens, classes + 3, dtype=dtype)[:, :classes]  # rows with a stride
    weight, out = seeded(classes, features, seed=1, dtype=dtype), torch.full((tokens, features), torch.nan, dtype=dtype)
    exact, scale = product_and_scale(grad, weight)
    matmul.hidden_product(grad, weight, out)
    unit = 2.0 ** (-52 if dtype == torch.float64 else -23)
    rounding, smallest = (1.01 * torch.finfo(dtype).eps / 2, 1e-7) if dtype.itemsize == 2 else (0.0, 0.0)
    assert bool(((out.double() - exact).abs() <= classes * unit * scale + rounding * exact.abs() + smallest).all())


def layouts_of_weights(classes, features):
    """The same shape in memory of every kind."""
    return {
        "rows": seeded(classes, features, seed=1, dtype=torch.float32),
        "columns": seeded(features, classes, seed=1, dtype=torch.float32).t(),
        "rows with a step": seeded(classes, features + 5, seed=1, dtype=torch.float32)[:, :features],
        "rows a page apart": seeded(classes, 1024, seed=1, dtype=torch.float32)[:, :features],
        "every second": seeded(classes, 2 * features, seed=1, dtype=torch.float32)[:, ::2],
        "one row": seeded(1, features, seed=1, dtype=torch.float32).expand(classes, features),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", layouts_of_weights(1, 1))
def test_gradients_by_hidden_states_take_weights_of_any_layout(layout, dtype):
    weight = layouts_of_weights(200, 65)[layout].to(dtype)
    grad = seeded(30, 203, dtype=dtype)[:, :200]  # rows with a stride
    exact, scale = product_and_scale(grad, weight)
    found = torch.full((30, 65), torch.nan, dtype=dtype)
    matmul.hidden_product(grad, weight, found)
    rounding = torch.finfo(dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= 201 * 2.0**-24 * scale + 1.01 * rounding * exact.abs() + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hidden_states_of_any_strides(dtype):
    dense, weight, _ = factors(dtype)
    target = targets("ids")
    expected = torch.autograd.grad(ours(dense, weight, target, chunk_tokens=4), (dense, weight))
    values = dense.detach()
    for strided in (values.t().contiguous().t(), torch.stack([values] * 2, 2)[:, :, 0]):
        assert strided.stride(1) != 1
        hidden = strided.requires_grad_()
        found = torch.autograd.grad(ours(hidden, weight, target, chunk_tokens=4), (hidden, weight))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


# ---- bits ----


@pytest.mark.parametrize("blocks", [True, False], ids=["as the CPU has it", "no bfloat16 of its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 30, 100, 999, 1000, 3001])
@pytest.mark.parametrize("features", [1, 31, 32, 100, 256])
def test_samples_have_the_same_bits_for_any_chunks_threads_and_isa(features, classes, dtype, blocks, monkeypatch, set_threads):
    if not blocks:
        without_bfloat16(monkeypatch)
    hidden, weight, bias = factors(dtype, tokens=131, classes=classes, features=features)
    target = seeded_ids(classes, 131)
    target[::5] = -100
    before, isa = torch.get_num_threads(), fastloss.isa()
    results = []
    cases = (
        (2, None, isa),
        (2, 1, isa),
        (1, 2, isa),
        (3, 7, isa),
        (2, 15, "scalar"),
        (7, 16, isa),
        (16, 50, isa),
        (24, 100, isa),
    )
    try:
        for threads, chunk_tokens, name in cases:
            torch.set_num_threads(threads)
            set_threads(threads)
            fastloss._cpu.set_isa(name)
            options = {"backward": "sampled", "threshold": 1e-3, "seed": 5, "chunk_tokens": chunk_tokens}
            loss = ours(hidden, weight, target, linear_bias=bias, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    finally:
        torch.set_num_threads(before)
        fastloss._cpu.set_isa(isa)
    for other in results[1:]:
        assert all(same_bits(one, first) for one, first in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("classes", "features"), [(1, 1), (70, 33), (3001, 100)])
def test_exact_gradients_have_the_same_bits_for_any_chunks_threads_and_isa(classes, features, dtype, monkeypatch, set_threads):
    without_bfloat16(monkeypatch)
    hidden, weight, bias = factors(dtype, tokens=131, classes=classes, features=features)
    target = seeded_ids(classes, 131)
    target[::5] = -100
    isa, results = fastloss.isa(), []
    try:
        for threads, chunk_tokens, name in ((2, None, isa), (1, 1, isa), (3, 7, "scalar"), (7, 50, isa), (24, 100, isa)):
            set_threads(threads)
            fastloss._cpu.set_isa(name)
            loss = ours(hidden, weight, target, linear_bias=bias, chunk_tokens=chunk_tokens)
            results.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    finally:
        fastloss._cpu.set_isa(isa)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))
