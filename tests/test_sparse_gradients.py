# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy(..., backward="sampled", sparse=True)`: the rows of the dense gradient, and no others."""

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch  # noqa: E402
from fastloss.torch import linear_ops  # noqa: E402
from fastloss.torch.projection import Projection  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

TOKENS, CLASSES, FEATURES = 13, 400, 5
IDS = seeded_ids(CLASSES, TOKENS)
IGNORED = IDS.masked_fill(torch.arange(TOKENS) % 3 == 0, -100)
TARGETS = {"ids": IDS, "ignored": IGNORED, "soft": seeded_probabilities(TOKENS, CLASSES)}
ours = fastloss.torch.linear_cross_entropy
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": seeded(CLASSES, seed=3).abs() + 0.1, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0},
    "chunks": {"chunk_tokens": 4, "denominator": 7.0},
}


def leaves(dtype=torch.float64):
    shapes = ((TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    return [seeded(*shape, seed=i, scale=1.0, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def loss_of(factors, sparse=True, target=IGNORED, **options):
    hidden, weight, bias = factors
    options = {"threshold": 1 / 16, "seed": 4} | options
    return ours(hidden, weight, target, linear_bias=bias, backward="sampled", sparse=sparse, **options)


def gradients(factors, upstream=None, **options):
    loss = loss_of(factors, **options)
    return torch.autograd.grad(loss, factors, torch.ones_like(loss) if upstream is None else upstream)


def assert_rows_of(sparse, dense, expected_ids):
    """Those rows of the dense gradient, bit for bit, and all others are zero."""
    assert sparse.layout is torch.sparse_coo
    assert sparse.is_coalesced()
    assert (sparse.sparse_dim(), sparse.dense_dim(), sparse.shape) == (1, dense.ndim - 1, dense.shape)
    (ids,) = sparse.indices()
    assert torch.equal(ids, expected_ids)
    assert same_bits(sparse.values(), dense[ids])
    assert not dense.index_fill(0, ids, 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_have_the_bits_of_the_dense_gradient(name, kind, dtype):
    factors, options = leaves(dtype), OPTIONS[name] | {"target": TARGETS[kind]}
    loss = loss_of(factors, **options)
    assert same_bits(loss, loss_of(factors, sparse=False, **options))
    upstream = seeded(*loss.shape, seed=9, dtype=loss.dtype) if loss.ndim else torch.tensor(-1.7, dtype=loss.dtype)
    by_hidden, by_weight, by_bias = gradients(factors, upstream, **options)
    dense = gradients(factors, upstream, sparse=False, **options)
    assert same_bits(by_hidden, dense[0])
    ids = dense[1].any(1).nonzero().squeeze(1)
    assert 0 < len(ids) < CLASSES
    assert_rows_of(by_weight, dense[1], ids)
    assert_rows_of(by_bias, dense[2], ids)


def test_threshold_near_nothing_gives_the_exact_gradient():
    factors = leaves()
    exact = ours(*factors[:2], IGNORED, linear_bias=factors[2])
    for one, other in zip(gradients(factors, threshold=1e-12), torch.autograd.grad(exact, factors), strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-11, atol=1e-13)


def test_the_dense_gradient_is_never_made(monkeypatch):
    made = []
    fresh = linear_ops.ops.fresh_matrix
    monkeypatch.setattr(linear_ops.ops, "fresh_matrix", lambda shape, dtype: (made.append(shape), fresh(shape, dtype))[1])
    by_weight = gradients(leaves())[1]
    assert made == [(TOKENS, FEATURES), tuple(by_weight.values().shape)]


def test_autograd_takes_the_values_over_without_a_copy(monkeypatch):
    places = []
    of_classes = linear_ops.of_classes

    def watched(ids, values, factor):
        places.append(values.data_ptr())
        return of_classes(ids, values, factor)

    monkeypatch.setattr(linear_ops, "of_classes", watched)
    factors = leaves()
    loss_of(factors).backward()
    assert [leaf.grad._values().data_ptr() for leaf in factors[1:]] == places


@pytest.mark.parametrize("existing", ["sparse", "dense"])
def test_gradients_accumulate(existing):
    factors, others = leaves(), leaves()
    loss_of(factors, sparse=existing == "sparse").backward()
    loss_of(factors, seed=5).backward()
    for seed in (4, 5):
        loss_of(others, sparse=False, seed=seed).backward()
    for leaf, other in zip(factors, others, strict=True):
        torch.testing.assert_close(leaf.grad.to_dense(), other.grad, rtol=1e-13, atol=1e-15)


def test_a_second_backward_gives_the_same_bits():
    factors = leaves()
    loss = loss_of(factors)
    first = torch.autograd.grad(loss, factors, retain_graph=True)
    for grad in first:
        grad.mul_(0)  # who owns a gradient may change it
    for again, other in zip(torch.autograd.grad(loss, factors), gradients(factors), strict=True):
        assert torch.equal(again.to_dense(), other.to_dense())


def test_stochastic_gradient_descent_takes_the_same_step():
    factors, others = leaves(), leaves()
    for variables, sparse in ((factors, True), (others, False)):
        optimizer = torch.optim.SGD(variables, lr=0.5)
        for seed in (1, 2):
            optimizer.zero_grad()
            loss_of(variables, sparse=sparse, seed=seed).backward()
            optimizer.step()
    torch.testing.assert_close(factors, others, rtol=1e-13, atol=1e-15)


def test_the_first_step_of_sparse_adam_is_that_of_adam_on_its_rows():
    factors, others = leaves(), leaves()
    before = [leaf.detach().clone() for leaf in factors]
    for variables, sparse, kind in ((factors, True, torch.optim.SparseAdam), (others, False, torch.optim.Adam)):
        optimizer = kind(variables[1:], lr=0.1, eps=1e-30)  # which the two add at different places
        loss_of(variables, sparse=sparse).backward()
        optimizer.step()
    for leaf, other, old in zip(factors[1:], others[1:], before[1:], strict=True):
        rows = leaf.grad.coalesce().indices()[0]
        torch.testing.assert_close(leaf[rows], other[rows], rtol=1e-6, atol=1e-8)
        unchanged = torch.ones(CLASSES, dtype=torch.bool)
        unchanged[rows] = False
        assert torch.equal(leaf[unchanged], old[unchanged])


def test_every_target_ignored_gives_a_gradient_without_rows():
    factors = leaves()
    hidden, weight, _ = factors
    by_hidden, by_weight, by_bias = gradients(factors, target=torch.full((TOKENS,), -100))
    assert torch.equal(by_hidden, torch.zeros_like(hidden))
    assert by_weight._nnz() == by_bias._nnz() == 0
    assert (by_weight.shape, by_weight.values().shape) == (weight.shape, (0, FEATURES))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_that_nobody_needs_are_not_made(frozen):
    factors = leaves()
    factors[frozen].requires_grad_(False)
    loss_of(factors).backward()
    assert [leaf.grad is None for leaf in factors] == [place == frozen for place in range(3)]
    with torch.no_grad():
        assert not loss_of(factors).requires_grad


def test_tied_weights_of_a_sparse_embedding():
    embedding = torch.nn.Embedding(CLASSES, FEATURES, sparse=True, dtype=torch.float64)
    options = {"backward": "sampled", "seed": 1}
    by_both = []
    for sparse in (True, False):
        embedding.zero_grad()
        ours(torch.tanh(embedding(IDS)), embedding.weight, IDS.roll(1), sparse=sparse, **options).backward()
        assert embedding.weight.grad.is_sparse == sparse
        by_both.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*by_both, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    factors = leaves()
    checkpoint(lambda *f: loss_of(f), *factors, use_reentrant=reentrant).backward()
    for leaf, grad in zip(factors, gradients(factors), strict=True):
        assert same_bits(leaf.grad.to_dense(), grad.to_dense())


def test_module():
    options = {"bias": True, "dtype": torch.float64, "backward": "sampled"}
    criterion = fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, sparse=True, **options)
    criterion(leaves()[0], IGNORED, seed=3).backward()
    assert all(parameter.grad.is_sparse for parameter in criterion.parameters())
    torch.optim.SparseAdam(criterion.parameters()).step()
    assert "sparse=True" in repr(criterion)
    assert "sparse" not in repr(fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, **options))


# ---- what it does not do is said before any work is done ----


def autocast():
    factors = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(factors)


def autocast_of_bias():
    hidden, weight, bias = (leaf.detach().to(dtype) for leaf, dtype in zip(leaves(), LOW, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of((hidden, weight, bias.requires_grad_()))


LOW = (torch.bfloat16, torch.bfloat16, torch.float32)
CALLS = {
    "exact": (lambda: ours(*leaves()[:2], IGNORED, sparse=True), ValueError, "backward='sampled'"),
    "a word": (
        lambda: ours(*leaves()[:2], IGNORED, backward="sampled", sparse="no"),
        TypeError,
        "sparse must be True or False, got 'no'",
    ),
    "module, a number": (
        lambda: fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, backward="sampled", sparse=1),
        TypeError,
        "sparse must be True or False, got 1",
    ),
    "places": (
        lambda: ours(leaves()[0], torch.zeros(CLASSES, 2, FEATURES).double(), IGNORED, backward="sampled", sparse=True),
        ValueError,
        r"further dimensions \(2,\)",
    ),
    "autocast": (autocast, TypeError, "autocast, bfloat16, for sparse=True, got float32"),
    "autocast, bias": (autocast_of_bias, TypeError, "linear_bias must have the dtype of autocast, bfloat16"),
    "func": (lambda: torch.func.grad(lambda *f: loss_of(f))(*leaves()), NotImplementedError, "sparse=False"),
    "vmap": (lambda: torch.vmap(lambda *f: loss_of(f))(*[f[None] for f in leaves()]), NotImplementedError, "sparse=False"),
    "module, exact": (
        lambda: fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, sparse=True),
        ValueError,
        "backward='sampled'",
    ),
    "module, places": (
        lambda: fastloss.torch.LinearCrossEntropyLoss(4, 5, out_features=(2,), backward="sampled", sparse=True),
        ValueError,
        r"further dimensions \(2,\)",
    ),
}


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(Projection, "logits", None)


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_raise(call, no_work):
    function, error, words = CALLS[call]
    with pytest.raises(error, match=words):
        function()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile_raises(fullgraph, no_work):
    factors = leaves()
    torch._dynamo.reset()
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match="plain tensors"):
        torch.compile(lambda: loss_of(factors), fullgraph=fullgraph, backend="eager")()
    torch._dynamo.reset()


def test_second_derivatives_raise():
    factors = leaves()
    loss = loss_of(factors)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, factors[0], create_graph=True)
    torch.autograd.grad(loss, factors)  # nothing was given away
