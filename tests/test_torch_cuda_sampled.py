# SPDX-License-Identifier: Apache-2.0
"""The sampled backward of linear cross-entropy of CUDA tensors, over the emulated module."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from cuda_linear_helpers import CLASSES, FEATURES, TOKENS, TOLERANCE, assert_near, expected, factors, ids  # noqa: E402
from fastloss.torch import linear_operators  # noqa: E402
from torch_helpers import TORCH_DTYPES, seeded, seeded_probabilities  # noqa: E402


@pytest.fixture(scope="module")
def oracle():
    """Made before anything is patched."""
    return {dtype: expected(factors(TORCH_DTYPES[dtype]), ids()) for dtype in TORCH_DTYPES}


@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize(
    ("offset", "options"),
    [
        (0, {"label_smoothing": 0.1}),
        # A z-loss of negative logits that takes nearly all of the factor of the probabilities away.
        (-40, {"z_loss": 0.0145}),
        (-40, {"z_loss": 0.0145, "label_smoothing": 0.1}),
    ],
)
def test_sample_is_that_of_the_cpu(kind, offset, options, linear, monkeypatch):
    """The same random numbers and the same rule: entries differ only where float64 rounds otherwise."""
    made = factors()
    target = ids() if kind == "ids" else seeded_probabilities(TOKENS, CLASSES)
    made[2] = (made[2].detach() + offset).requires_grad_()
    options = {"linear_bias": made[2], "backward": "sampled", "seed": 11, "threshold": 1 / 16, **options}
    ours = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, chunk_tokens=4, **options), made)
    monkeypatch.undo()
    cpu = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    for one, other in zip(ours, cpu, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_threshold_near_nothing_keeps_the_exact_gradient(dtype, oracle, linear):
    made, target = factors(TORCH_DTYPES[dtype]), ids()
    loss = fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2], backward="sampled", threshold=1e-9)
    exact, gradients = oracle[dtype]
    assert_near(loss, exact, TOLERANCE[dtype])
    for ours, gradient in zip(torch.autograd.grad(loss, made), gradients, strict=True):
        assert_near(ours, gradient, TOLERANCE[dtype])


def test_sampled_gradients_have_the_same_bits_from_run_to_run_and_for_any_chunks(linear):
    # Small whole numbers, so that every product gives the same logits.
    hidden = seeded(TOKENS, FEATURES, scale=2.0).round().float().requires_grad_()
    weight = seeded(CLASSES, FEATURES, scale=2.0).round().float().requires_grad_()
    results = []
    for chunk_tokens in (None, None, 1, 5):
        options = {"backward": "sampled", "seed": 2, "threshold": 1 / 8, "chunk_tokens": chunk_tokens}
        loss = fl.linear_cross_entropy(hidden, weight, ids(), **options)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_sparse_gradients_have_the_bits_of_the_dense_ones(dtype, linear):
    made, target = factors(TORCH_DTYPES[dtype], classes=3000), ids(classes=3000)
    options = {"linear_bias": made[2], "backward": "sampled", "threshold": 1 / 8, "seed": 4}
    dense = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    sparse = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, sparse=True, **options), made)
    assert torch.equal(sparse[0], dense[0])
    for one, other in zip(sparse[1:], dense[1:], strict=True):
        assert one.is_coalesced()
        assert len(one.values()) < len(other)
        assert torch.equal(one.to_dense(), other)


def test_seeds_are_drawn_where_they_are_used(linear):
    made, target = factors(bias=False), ids()

    def by_hidden(**seed):
        return torch.autograd.grad(fl.linear_cross_entropy(*made, target, backward="sampled", threshold=0.5, **seed), made[0])[
            0
        ]

    torch.manual_seed(3)
    first, second = by_hidden(), by_hidden()
    torch.manual_seed(3)
    assert torch.equal(first, by_hidden())
    assert not torch.equal(first, second)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    assert torch.equal(*(by_hidden(seed=generator) for generator in generators))


def test_operators_say_the_shapes_they_return(linear):
    from torch._subclasses.fake_tensor import FakeTensorMode

    made, target = factors(bias=False), ids()
    arguments = (*made, None, None, target, None, None, -100, 0.1, 0.0, 0.0, 1.0, 1, None, 1 / 16, torch.tensor(1))
    with torch.no_grad():
        real = torch.ops.fastloss.linear_cross_entropy_sampled(*arguments)
    with FakeTensorMode() as mode:
        on_gpu = [torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a for a in arguments]
        with mode:
            fake = linear_operators._sampled_fake(*on_gpu)
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
