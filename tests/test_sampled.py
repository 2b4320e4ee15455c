# SPDX-License-Identifier: Apache-2.0
"""The sampled backward: the rule entry by entry, its mean and variance, its random numbers, and the same bits everywhere."""

from functools import partial

import numpy as np
import pytest

import fastloss
import reference
from binding import Call, aligned_weight
from fastloss._sampled import Sampler, SparseGradient
from helpers import assert_same_bits
from reference import Options

CLASSES = 300
OPTIONS = {
    "plain": Options(),
    "smoothing": Options(label_smoothing=0.2),
    "everything": Options(
        weight=np.linspace(0.5, 1.5, CLASSES), label_smoothing=0.1, z_loss=0.01, temperature=0.8, softcap=5.0
    ),
}
DTYPES = (np.float32, np.float64)


def sampled_entries(logits, target, options, threshold, seed, numbers=None):
    """Dense matrix of what was kept, zeros elsewhere, and how many entries each row kept."""
    rows, classes = logits.shape
    numbers = np.arange(rows) if numbers is None else numbers
    sampler = Sampler(seed, threshold, logits.dtype)
    weight = None if options.weight is None else aligned_weight(options.weight, logits)
    Call(logits, target, options._replace(weight=weight), reduction="none").forward(sampled=sampler.start(numbers))
    entries = sampler.entries(int(numbers.max()) + 1)
    dense = np.zeros((entries.rows, classes))
    of_row = np.repeat(np.arange(entries.rows), np.diff(entries.start))
    dense[of_row, entries.columns] = entries.values
    return dense[numbers], np.diff(entries.start)[numbers]


def row_factor(logits, target, options):
    """s: what multiplies a row's probabilities in its gradient, times the slope of the temperature."""
    z = options.transformed(logits)
    w = options.class_weights(z.shape[1])
    y_weight = 1.0 if reference.is_soft(target) else w[target]
    mass = (1 - options.label_smoothing) * (
        (w * target).sum(-1) if reference.is_soft(target) else y_weight
    ) + options.label_smoothing / z.shape[1] * w.sum()
    return (mass + 2 * y_weight * options.z_loss * reference.log_sum_exp(z)) / options.temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_entry_is_left_out_or_exact_or_of_the_size_of_the_threshold(name, soft, dtype, rng, isa):
    options, threshold = OPTIONS[name], 1 / 32
    logits = (3 * rng.standard_normal((50, CLASSES))).astype(dtype)
    target = rng.dirichlet(np.ones(CLASSES), 50).astype(dtype) if soft else rng.integers(CLASSES, size=50)
    exact = np.asarray(reference.cross_entropy_gradient(logits, target, options, "none"), np.float64)
    least = threshold * np.asarray(row_factor(logits, target, options), np.float64)[:, None] * np.ones_like(exact)
    found, _ = sampled_entries(logits, target, options, threshold, seed=7)
    own = np.zeros_like(exact, bool)
    if not soft:
        own[np.arange(50), target] = True
    large = (np.abs(exact) >= least * (1 + 1e-5)) | own
    small = (np.abs(exact) <= least * (1 - 1e-5)) & ~own
    np.testing.assert_allclose(found[large], exact[large], rtol=2e-5, atol=1e-9)
    kept = small & (found != 0)
    np.testing.assert_allclose(found[kept], np.copysign(least, exact)[kept], rtol=2e-5)
    assert 0 < kept.sum() < small.sum()


@pytest.mark.parametrize("threshold", [2.0**-2, 2.0**-6, 2.0**-9])
@pytest.mark.parametrize("name", OPTIONS)
def test_mean_and_variance_are_those_of_the_rule(name, threshold, rng):
    options, tokens = OPTIONS[name], 20000
    row = (3 * rng.standard_normal((1, CLASSES))).astype(np.float32)
    logits, target = np.repeat(row, tokens, 0), np.full(tokens, 5)
    exact = np.asarray(reference.cross_entropy_gradient(row, target[:1], options, "none"), np.float64)[0]
    least = threshold * float(row_factor(row, target[:1], options)[0])
    found, kept = sampled_entries(logits, target, options, threshold, seed=11)
    variance = np.where(np.abs(exact) < least, least * np.abs(exact) - exact**2, 0)
    variance[5] = 0
    often = (variance > 0) & (tokens * np.abs(exact) / least >= 25)  # frequent enough for the central limit theorem
    error = (found.mean(0) - exact)[often] / np.sqrt(variance[often] / tokens)
    assert often.sum() > 20
    assert np.abs(error).max() < 5
    assert 0.6 < np.sqrt((error**2).mean()) < 1.4
    np.testing.assert_allclose(found.var(0)[often], variance[often], rtol=6 / np.sqrt(25))
    assert np.all(found.var(0) <= least * np.abs(exact) * (1 + 6 / np.sqrt(25)) + 40 * least**2 / tokens)
    total = np.abs(found.sum(1).mean() - exact.sum())
    assert total < 5 * np.sqrt(variance.sum() / tokens) + 1e-6
    assert abs(kept.mean() - (np.minimum(np.abs(np.delete(exact, 5)) / least, 1).sum() + 1)) < 0.2


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_z_loss_that_takes_the_factor_of_the_probabilities_away_keeps_no_more_entries(label_smoothing, rng):
    threshold, rows, classes = 1 / 16, 20, 4000
    options = Options(label_smoothing=label_smoothing, z_loss=0.015)
    logits = (rng.standard_normal((rows, classes)) - 40).astype(np.float32)
    target = rng.integers(classes, size=rows)
    found, kept = sampled_entries(logits, target, options, threshold, seed=3)
    limit = (1 if label_smoothing == 0 else 2) / threshold + 1
    assert kept.mean() <= limit + 5 * np.sqrt(limit / rows)
    # s: the factor, or the mean of it and of what smoothing adds to the other entries.
    factor = np.abs(row_factor(logits, target, options))
    least = threshold * np.maximum(factor, (factor + label_smoothing) / 2)
    found[np.arange(rows), target] = 0
    for row in range(rows):
        assert np.abs(found[row][found[row] != 0]).min() >= least[row] * (1 - 1e-5)
        assert np.isclose(np.abs(found[row]), least[row], rtol=1e-5).any()


def test_entries_are_kept_independently(rng):
    tokens = 40000
    logits = np.zeros((tokens, 64), np.float32)
    found, _ = sampled_entries(logits, np.full(tokens, 63), Options(), 1 / 16, seed=3)
    kept = found[:, :63] != 0
    p = 1 / 64 / (1 / 16)
    correlation = np.corrcoef(kept.T) - np.eye(63)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(tokens)
    for lag in (1, 2, 7):
        lagged = np.mean(kept[lag:] & kept[:-lag])
        assert abs(lagged - p * p) < 6 * p / np.sqrt(kept.size)


def test_rare_entries_are_kept_as_often_as_they_should(rng):
    """Probabilities far below the threshold: 2^-20 of it, beyond what 24 random bits would tell apart from nothing."""
    tokens, classes = 200, 60000
    logits = np.zeros((tokens, classes), np.float32)
    logits[:, 0] = np.log(2.0**20)
    found, _ = sampled_entries(logits, np.zeros(tokens, np.int64), Options(), 1.0, seed=5)
    exact = 1 / (2.0**20 + classes - 1)
    expected = tokens * (classes - 1) * exact
    assert abs((found[:, 1:] != 0).sum() - expected) < 5 * np.sqrt(expected)


def test_random_numbers_depend_on_seed_token_and_class_alone(rng):
    logits, target = rng.standard_normal((40, CLASSES)).astype(np.float32), rng.integers(CLASSES, size=40)
    whole, _ = sampled_entries(logits, target, Options(), 1 / 8, seed=1)
    part, _ = sampled_entries(logits[10:20], target[10:20], Options(), 1 / 8, seed=1, numbers=np.arange(10, 20))
    assert_same_bits(part, whole[10:20])
    other, _ = sampled_entries(logits, target, Options(), 1 / 8, seed=2)
    assert not np.array_equal(whole, other)


@pytest.fixture
def exact_factors(rng):
    """Small whole numbers, whose products and sums are exact: every matrix product gives the same logits."""
    hidden = rng.integers(-2, 3, (70, 8)).astype(np.float32)
    weight = rng.integers(-2, 3, (9001, 8)).astype(np.float32)
    target = rng.integers(9001, size=70)
    target[::7] = -100
    return hidden, weight, target


def test_same_bits_for_any_chunks_threads_and_isa(exact_factors, set_threads):
    options = {"backward": "sampled", "threshold": 1 / 16, "seed": 9, "return_grad": True, "label_smoothing": 0.1}
    fastloss._cpu.set_isa("scalar")
    set_threads(1)
    expected = fastloss.linear_cross_entropy(*exact_factors, **options)
    try:
        for isa in fastloss.available_isas():
            fastloss._cpu.set_isa(isa)
            for threads in (1, 3):
                set_threads(threads)
                for chunk_tokens in (1, 16, 64, None):
                    loss, grads = fastloss.linear_cross_entropy(*exact_factors, chunk_tokens=chunk_tokens, **options)
                    assert_same_bits(loss, expected[0])
                    for one, other in zip(grads[:2], expected[1][:2], strict=True):
                        assert_same_bits(one, other)
    finally:
        fastloss._cpu.set_isa(fastloss.available_isas()[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_of_real_numbers_for_any_chunks_and_threads(dtype, rng, set_threads):
    hidden = rng.standard_normal((131, 65)).astype(dtype)
    weight = (rng.standard_normal((3001, 65)) / 8).astype(dtype)
    target = rng.integers(3001, size=131)
    options = {"backward": "sampled", "threshold": 1e-5, "seed": 9, "return_grad": True}
    results = []
    for threads, chunk_tokens in ((1, None), (2, 1), (2, 7), (3, 48), (1, 50), (2, 100)):
        set_threads(threads)
        results.append(fastloss.linear_cross_entropy(hidden, weight, target, chunk_tokens=chunk_tokens, **options))
    (expected, grads), *others = results
    for loss, other_grads in others:
        assert_same_bits(loss, expected)
        for one, other in zip(other_grads[:2], grads[:2], strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 20])
def test_entries_by_class_stay_in_the_order_of_the_tokens(threads, dtype, rng, set_threads):
    set_threads(threads)
    tokens, classes = 500, 1000
    kept = rng.random((tokens, classes)) < rng.uniform(0.2, 0.6, (tokens, 1))
    kept[:, 700:] = kept[100:200] = False
    of_token, columns = kept.nonzero()
    assert len(columns) > 2**16  # several threads take part
    start = np.concatenate([[0], np.cumsum(kept.sum(1))])
    values = rng.standard_normal(len(columns)).astype(dtype)
    found = SparseGradient(start, columns.astype(np.int32), values).transposed(classes)
    by_class = np.lexsort((of_token, columns))
    np.testing.assert_array_equal(found.start, np.concatenate([[0], np.cumsum(kept.sum(0))]))
    np.testing.assert_array_equal(found.columns, of_token[by_class])
    assert_same_bits(found.values, values[by_class])


def test_threshold_near_nothing_keeps_the_exact_gradient(rng):
    hidden, weight = rng.standard_normal((6, 4)), rng.standard_normal((50, 4))
    arguments = (hidden, weight, rng.integers(50, size=6))
    options = {"bias": rng.standard_normal(50), "return_grad": True}
    _, exact = fastloss.linear_cross_entropy(*arguments, **options)
    _, sampled = fastloss.linear_cross_entropy(*arguments, backward="sampled", threshold=1e-12, seed=0, **options)
    for one, other in zip(sampled, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_a_token_of_nan_spoils_no_other(rng):
    hidden, weight, target = rng.standard_normal((6, 4)), rng.standard_normal((50, 4)), np.arange(6)
    hidden[2] = np.nan
    for y in (target, np.full((6, 50), 0.02)):
        loss, (dhidden, _, _) = fastloss.linear_cross_entropy(
            hidden, weight, y, reduction="sum", backward="sampled", seed=0, return_grad=True
        )
        assert np.isnan(loss)
        assert np.isnan(dhidden[2]).all()
        assert np.isfinite(np.delete(dhidden, 2, 0)).all()


# ---- through PyTorch ----


@pytest.fixture
def problem(rng):
    torch = pytest.importorskip("torch")
    hidden = torch.from_numpy(rng.standard_normal((30, 6))).requires_grad_()
    weight = torch.from_numpy(rng.standard_normal((200, 6))).requires_grad_()
    bias = torch.from_numpy(rng.standard_normal(200)).requires_grad_()
    target = torch.from_numpy(rng.integers(200, size=30))
    target[::4] = -100
    return torch, (hidden, weight, bias), target


def gradients(problem, upstream=None, **options):
    torch, (hidden, weight, bias), target = problem
    from fastloss.torch import linear_cross_entropy

    loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias, backward="sampled", threshold=1 / 16, **options)
    return loss, torch.autograd.grad(loss, (hidden, weight, bias), upstream)


def test_numpy_and_pytorch_give_the_same_bits(problem):
    _, factors, target = problem
    loss, grads = gradients(problem, seed=4)
    hidden, weight, bias = (factor.detach().numpy() for factor in factors)
    options = {"bias": bias, "backward": "sampled", "threshold": 1 / 16, "seed": 4, "return_grad": True}
    same, numpy_grads = fastloss.linear_cross_entropy(hidden, weight, target.numpy(), **options)
    np.testing.assert_allclose(loss.item(), same, rtol=1e-14)
    for one, other in zip(grads, numpy_grads, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-12, atol=1e-15)


def test_manual_seed_reproduces_and_generators_serve(problem):
    torch = problem[0]
    torch.manual_seed(3)
    first, second = gradients(problem)[1], gradients(problem)[1]
    torch.manual_seed(3)
    again = gradients(problem)[1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[1], second[1])
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    one, other = (gradients(problem, seed=generator)[1] for generator in generators)
    assert torch.equal(one[1], other[1])
    assert torch.equal(gradients(problem, seed=-1)[1][1], gradients(problem, seed=-1)[1][1])


def test_loss_is_exact_and_upstream_gradients_are_applied(problem):
    torch = problem[0]
    loss, grads = gradients(problem, seed=4, reduction="sum")
    from fastloss.torch import linear_cross_entropy

    hidden, weight, bias = problem[1]
    exact = linear_cross_entropy(hidden, weight, problem[2], linear_bias=bias, reduction="sum")
    assert torch.equal(loss, exact)
    _, scaled = gradients(problem, torch.tensor(-2.5, dtype=torch.float64), seed=4, reduction="sum")
    for one, other in zip(scaled, grads, strict=True):
        torch.testing.assert_close(one, -2.5 * other, rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(-1, 2, 30, dtype=torch.float64)
    _, by_token = gradients(problem, upstream, seed=4, reduction="none")
    torch.testing.assert_close(by_token[0], grads[0] * upstream[:, None], rtol=1e-12, atol=1e-14)


def test_second_derivatives_are_those_of_the_exact_loss(problem):
    torch, factors, target = problem
    from fastloss.torch import linear_cross_entropy

    seconds = []
    for options in ({}, {"backward": "sampled", "seed": 1}):
        loss = linear_cross_entropy(*factors[:2], target, linear_bias=factors[2], **options)
        (grad,) = torch.autograd.grad(loss, factors[0], create_graph=True)
        seconds.append(torch.autograd.grad(grad, factors[1], torch.ones_like(grad))[0])
    torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_under_vmap_each_sample_has_the_bits_that_it_has_alone(problem, randomness):
    torch, (hidden, weight, bias), target = problem
    from fastloss.torch import linear_cross_entropy

    count = 3
    batch = torch.stack([(1 + i) * hidden.detach() for i in range(count)])  # which differ in the number of entries
    ids = torch.stack([target.roll(i) for i in range(count)])

    def gradient(hidden, weight, ids, seed=None):
        def loss(*factors):
            options = {"linear_bias": bias.detach(), "backward": "sampled", "threshold": 1 / 16, "seed": seed}
            return linear_cross_entropy(*factors, ids, **options)

        return torch.func.grad(loss, (0, 1))(hidden, weight)

    torch.manual_seed(5)
    found = torch.vmap(gradient, (0, None, 0), randomness=randomness)(batch, weight.detach(), ids)
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (count,) if randomness == "different" else ()).expand(count).tolist()
    given = torch.vmap(partial(gradient, seed=seeds[0]), (0, None, 0))(batch, weight.detach(), ids)
    nested = torch.vmap(torch.vmap(partial(gradient, seed=seeds[0]), (0, None, 0)), (0, None, 0))(
        batch[:, None], weight.detach(), ids[:, None]
    )
    for i, seed in enumerate(seeds):
        for got, expected in zip(found, gradient(batch[i], weight.detach(), ids[i], seed), strict=True):
            assert torch.equal(got[i], expected)
        expected = gradient(batch[i], weight.detach(), ids[i], seeds[0])
        for one, other, alone in zip(given, nested, expected, strict=True):
            assert torch.equal(one[i], alone)
            assert torch.equal(other[i, 0], alone)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(gradient, (0, None, 0))(batch, weight.detach(), ids)


def test_nothing_is_sampled_without_gradients(problem, monkeypatch):
    torch, factors, target = problem
    from fastloss.torch import linear_cross_entropy

    monkeypatch.setattr(fastloss._cpu, "SampledGradient", None)
    with torch.no_grad():
        assert torch.isfinite(linear_cross_entropy(*factors[:2], target, backward="sampled"))
