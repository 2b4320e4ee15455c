# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy of CUDA tensors, without a GPU: its calls go to the kernels as the CPU runs them.

Tensors stay on the CPU, which makes the products; `fastloss._cuda` is the emulated module of tests/cuda_emulation.
"""

import contextlib

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from cuda_binding import load_emulation  # noqa: E402
from fastloss.torch import linear_operators, linear_ops, ops  # noqa: E402
from fastloss.torch.projection import NOTHING  # noqa: E402
from torch_helpers import TORCH_DTYPES, seeded, seeded_ids, seeded_probabilities, torch_over_emulation  # noqa: E402

emulated = load_emulation()
TOKENS, FEATURES, CLASSES = 21, 8, 301
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 6.0, "temperature": 0.8},
}
# Of the largest entry: the rounding of logits and gradients to 16 bits, as the CPU path has it.
TOLERANCE = {"float32": 1e-5, "float64": 1e-6, "float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture
def linear(monkeypatch):
    with torch_over_emulation(emulated, monkeypatch) as (_, module):
        yield module


@pytest.fixture
def projection(linear):
    from fastloss.torch import cuda_projection

    return cuda_projection


def factors(dtype=torch.float64, classes=CLASSES, bias=True):
    made = [seeded(TOKENS, FEATURES, scale=1.0, dtype=dtype), seeded(classes, FEATURES, seed=1, scale=1.0, dtype=dtype)]
    made += [seeded(classes, seed=2, scale=1.0, dtype=dtype)] if bias else []
    return [factor.requires_grad_() for factor in made]


def ids(classes=CLASSES, every=4):
    target = seeded_ids(classes, TOKENS)
    target[::every] = -100
    return target


def expected(factors, target, upstream=None, **options):
    """Loss and gradients in float64, from logits as `cross_entropy` of the CPU has them."""
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    loss = fl.cross_entropy(torch.nn.functional.linear(*exact), target, **options)
    return loss, torch.autograd.grad(loss, exact, upstream)


def assert_near(ours, exact, tolerance):
    error = (ours.double() - exact).abs().max()
    assert error <= tolerance * exact.abs().max(), f"off by {error / exact.abs().max():.1e}"


@pytest.fixture(scope="module")
def oracle():
    """Made before anything is patched."""
    answers = {}
    for dtype in TORCH_DTYPES:
        for name, options in OPTIONS.items():
            for kind in ("ids", "soft"):
                target = ids() if kind == "ids" else seeded_probabilities(TOKENS, CLASSES)
                answers[dtype, name, kind] = expected(factors(TORCH_DTYPES[dtype]), target, **options)
    return answers


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_loss_and_gradients_are_those_of_the_logits(dtype, name, kind, chunk_tokens, oracle, linear):
    made = factors(TORCH_DTYPES[dtype])
    target = ids() if kind == "ids" else seeded_probabilities(TOKENS, CLASSES)
    bias = made[2]
    loss = fl.linear_cross_entropy(*made[:2], target, linear_bias=bias, chunk_tokens=chunk_tokens, **OPTIONS[name])
    assert loss.dtype == ops.accumulation_dtype(bias.dtype)
    exact, gradients = oracle[dtype, name, kind]
    assert_near(loss, exact, TOLERANCE[dtype])
    for ours, gradient in zip(torch.autograd.grad(loss, made), gradients, strict=True):
        assert ours.dtype == bias.dtype
        assert_near(ours, gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_losses_of_tokens_and_their_upstream_gradients(backward, linear):
    made, target = factors(), ids()
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    options = {"backward": backward, "threshold": 1e-9, "chunk_tokens": 6}
    losses = fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2], reduction="none", **options)
    logits = torch.nn.functional.linear(*made)
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses, exact, rtol=1e-9, atol=1e-12)
    for ours, gradient in zip(
        torch.autograd.grad(losses, made, upstream), torch.autograd.grad(exact, made, upstream), strict=True
    ):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_scaled_loss_scales_its_gradients(backward, linear):
    made, target = factors(), ids()
    options = {"linear_bias": made[2], "backward": backward, "seed": 3}
    plain = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    scaled = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options) * -2.5, made)
    loss = fl.linear_cross_entropy(*made[:2], target, **options)
    negated = torch.autograd.grad(loss, made, torch._neg_view(torch.tensor(2.5, dtype=loss.dtype)))
    for one, other, third in zip(scaled, plain, negated, strict=True):
        torch.testing.assert_close(one, -2.5 * other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(third, one, rtol=1e-12, atol=1e-14)


def test_class_weights_make_the_denominator(linear):
    made, target = factors(bias=False), ids()
    weight = torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)
    loss = fl.linear_cross_entropy(*made, target, weight=weight, chunk_tokens=4)
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target, weight=weight)
    torch.testing.assert_close(loss, exact)
    for ours, gradient in zip(torch.autograd.grad(loss, made), torch.autograd.grad(exact, made), strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


def test_nothing_counted_is_nan_without_gradients_and_a_denominator_makes_it_zero(linear):
    made = factors(bias=False)
    target = torch.full((TOKENS,), -100)
    loss = fl.linear_cross_entropy(*made, target)
    assert loss.isnan()
    assert all(not grad.any() for grad in torch.autograd.grad(loss, made))
    assert fl.linear_cross_entropy(*made, target, denominator=7.0) == 0


def test_no_tokens_at_all(linear):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    for backward in ("exact", "sampled"):
        target = torch.zeros(0, dtype=torch.long)
        loss = fl.linear_cross_entropy(hidden, weight, target, reduction="sum", backward=backward)
        assert loss == 0
        by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
        assert by_hidden.shape == hidden.shape
        assert torch.equal(by_weight, torch.zeros_like(weight))


def test_hidden_states_of_ignored_tokens_may_hold_anything(linear):
    made, target = factors(), ids()
    options = {"linear_bias": made[2], "chunk_tokens": 5}
    clean = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    with torch.no_grad():
        made[0][target == -100] = torch.nan
    dirty = torch.autograd.grad(fl.linear_cross_entropy(*made[:2], target, **options), made)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_leaving_out_chunks_without_counted_tokens_changes_no_bit(backward, projection, monkeypatch):
    made, target = factors(torch.float32), ids(every=2)
    made_chunks = []
    logits = projection.Projection.logits

    def seen(self, tokens):
        made_chunks[-1] += 1
        return logits(self, tokens)

    monkeypatch.setattr(projection.Projection, "logits", seen)

    class Arrived:
        def __init__(self, counts):
            self.counts = counts

        def wait(self):
            return int(self.counts.sum())

    results = []
    for count in (lambda counts: None, Arrived):
        made_chunks.append(0)
        monkeypatch.setattr(projection, "_count_worth_waiting_for", count)
        options = {"linear_bias": made[2], "chunk_tokens": 4, "backward": backward, "seed": 1, "threshold": 1 / 8}
        loss = fl.linear_cross_entropy(*made[:2], target, **options)
        losses = fl.linear_cross_entropy(*made[:2], target, reduction="none", **options)
        results.append((loss, losses, *torch.autograd.grad(loss, made), *torch.autograd.grad(losses.sum(), made)))
    assert made_chunks[1] < made_chunks[0]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_default_chunks_are_made_for_the_tokens_that_count(projection, monkeypatch):
    made, target = factors(bias=False), ids(every=2)
    made_chunks = []
    logits = projection.Projection.logits
    monkeypatch.setattr(
        projection.Projection, "logits", lambda self, tokens: made_chunks.append(tokens) or logits(self, tokens)
    )
    monkeypatch.setattr(projection.Order, "counted", lambda self: int((target != -100).sum()))
    loss = fl.linear_cross_entropy(*made, target)
    gradients = torch.autograd.grad(loss, made)
    assert [chunk.stop for chunk in made_chunks] == [TOKENS // 2]
    monkeypatch.undo()
    exact, expected_gradients = expected(made, target)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    for ours, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9)


def test_more_entries_than_can_be_sorted_are_refused_before_any_work(linear, monkeypatch):
    made, target = factors(bias=False), ids()
    monkeypatch.setattr(linear, "MOST_ENTRIES", 21 * 301 - 1)
    monkeypatch.setattr(linear, "_forward", None)
    with pytest.raises(ValueError, match=r"input has 21 tokens with places for 301 entries each, more than the 6320"):
        fl.linear_cross_entropy(*made, target, backward="sampled", threshold=1e-9)


def test_host_asks_how_many_tokens_count_only_after_a_call_that_ignored_some(projection, monkeypatch):
    monkeypatch.undo()  # the functions that decide, over a count that needs no GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(projection, "_last", {})

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    class Count:
        def __init__(self, counts):
            self.all = bool(counts.all())

        def is_all(self):
            return self.all

    monkeypatch.setattr(projection, "Count", Count)
    everything, some = torch.ones(4, dtype=torch.bool), torch.tensor([True, False])

    def asks(counts):
        return projection._count_worth_waiting_for(counts) is not None

    assert [asks(counts) for counts in (everything, some, some, everything, everything)] == [False, False, True, True, False]
    asks(some)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not asks(some)


def test_id_out_of_range_is_nan_and_raises_when_debugging(linear, monkeypatch):
    made, target = factors(), ids()
    target[5] = CLASSES
    for backward in ("exact", "sampled"):
        losses = fl.linear_cross_entropy(*made[:2], target, reduction="none", backward=backward)
        assert losses.isnan().nonzero().tolist() == [[5]]
        (by_hidden,) = torch.autograd.grad(losses.sum(), made[0])
        assert by_hidden[5].isnan().all()
        assert by_hidden[:5].isfinite().all()
    monkeypatch.setattr(linear.cuda, "DEBUG", True)
    with pytest.raises(IndexError, match=rf"target\[5\] = {CLASSES} is out of range for {CLASSES} classes"):
        fl.linear_cross_entropy(*made[:2], target)
    with pytest.raises(IndexError, match=rf"target\[5\] = {CLASSES}"):
        fl.linear_logit_stats(*made[:2], target.clamp(min=0))


def test_second_derivatives_go_through_the_plain_formula(linear):
    made, target = factors(classes=7), ids(classes=7)
    seconds = []
    for loss in (
        fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2]),
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target),
    ):
        (grad,) = torch.autograd.grad(loss, made[0], create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), made[1])[0])
    torch.testing.assert_close(*seconds, rtol=1e-6, atol=1e-9)


def test_target_probabilities_get_a_gradient(linear):
    made, target = factors(), seeded_probabilities(TOKENS, CLASSES).requires_grad_()
    loss = fl.linear_cross_entropy(*made[:2], target, linear_bias=made[2], chunk_tokens=4)
    (ours,) = torch.autograd.grad(loss, target)
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*made), target)
    torch.testing.assert_close(ours, torch.autograd.grad(exact, target)[0], rtol=1e-6, atol=1e-9)


def test_module_takes_the_same_path(linear):
    criterion = fl.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, dtype=torch.float64, backward="sampled")
    hidden = seeded(TOKENS, FEATURES).requires_grad_()
    criterion(hidden, ids()).backward()
    assert criterion.linear.weight.grad.isfinite().all()


# ---- statistics ----


@pytest.mark.parametrize("k", [1, 3])
def test_statistics_of_chunks_and_their_gradients(k, linear, monkeypatch):
    made = factors()
    target = seeded_ids(CLASSES, TOKENS, k) if k > 1 else seeded_ids(CLASSES, TOKENS)
    want = ("logprob", "entropy", "rank")
    exact = fl.logit_stats(torch.nn.functional.linear(*made), target, want=want)
    gradients = torch.autograd.grad((exact.logprob.sum() + exact.entropy.square().sum()), made)

    def statistics(logits, ids, bias, dim, softcap, temperature, want):
        outputs = ops.stats_outputs(logits, ids, dim, want)
        outputs[-1] = outputs[-1].new_empty((len(logits), 3))  # as on a GPU
        linear.cuda.statistics(logits, ids.contiguous(), k, bias, dim, softcap, temperature, outputs, want)
        return outputs

    def gradient(logits, saved, coefficients, ids, g, bias, dim, softcap, temperature, inplace):
        contiguous = (saved.contiguous(), coefficients.contiguous(), ids.contiguous(), k, g.contiguous())
        linear.cuda.gradient(logits, *contiguous, bias, dim, softcap, temperature, logits)
        return logits

    monkeypatch.setattr(ops, "statistics", statistics)
    monkeypatch.setattr(ops, "gradient", gradient)
    stats = fl.linear_logit_stats(*made[:2], target, bias=made[2], want=want, chunk_tokens=5)
    torch.testing.assert_close(stats.logprob, exact.logprob, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats.entropy, exact.entropy, rtol=1e-6, atol=1e-9)
    assert torch.equal(stats.rank, exact.rank)
    ours = torch.autograd.grad((stats.logprob.sum() + stats.entropy.square().sum()), made)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# ---- the sampled backward ----


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
    exact, gradients = oracle[dtype, "plain", "ids"]
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
