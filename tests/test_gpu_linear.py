# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy on a GPU: what only a GPU can show. Values and options are in test_linear_torch.py, on each device."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from fastloss._sampled import slots_of_token  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODES = ("exact", "sampled")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def factors(tokens=700, classes=30_001, features=96, dtype=torch.bfloat16, seed=0):
    """Aligned or not: rows of 30001 logits are not, those of 96 features are."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    hidden, weight = normal(tokens, features), 2 * normal(classes, features) / features**0.5
    target = torch.randint(classes, (tokens,), device="cuda", generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def gradients(hidden, weight, target, **options):
    loss = fl.linear_cross_entropy(hidden, weight, target, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def relative_error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("chunk_tokens", [None, 256])
@pytest.mark.parametrize("features", [96, 97])
@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32], ids=str)
def test_gpu_linear_gradients_are_as_good_as_those_of_pytorch(dtype, features, chunk_tokens):
    hidden, weight, target = factors(features=features, dtype=dtype)
    target[::5] = -100
    exact = [factor.detach().double().requires_grad_() for factor in (hidden, weight)]
    loss = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target)
    truth = torch.autograd.grad(loss, exact)
    theirs = torch.autograd.grad(torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target), (hidden, weight))
    found, *ours = gradients(hidden, weight, target, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found.double(), loss.detach(), rtol=2e-3, atol=0)
    for one, other, true in zip(ours, theirs, truth, strict=True):
        assert relative_error(one, true) <= 1.1 * relative_error(other, true) + 2.0**-12


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32, torch.float64], ids=str)
def test_gpu_sample_without_a_threshold_is_the_exact_gradient(dtype):
    made = factors(tokens=60, classes=901, dtype=dtype)
    exact, sampled = gradients(*made), gradients(*made, backward="sampled", threshold=1e-9)
    for one, other in zip(sampled, exact, strict=True):
        assert relative_error(one, other.double()) < (1e-2 if dtype in SIXTEEN_BIT else 1e-5)


def test_gpu_sparse_gradients_have_the_bits_of_the_dense_ones():
    made = factors()
    dense = gradients(*made, backward="sampled", seed=3)
    sparse = gradients(*made, backward="sampled", seed=3, sparse=True)
    assert torch.equal(sparse[1], dense[1])
    assert torch.equal(sparse[2].to_dense(), dense[2])


def test_gpu_samples_are_without_bias():
    hidden, weight, target = factors(tokens=256, classes=2001, dtype=torch.float32)
    exact, total, count = gradients(hidden, weight, target)[2], 0, 200
    for seed in range(count):
        total = total + gradients(hidden, weight, target, backward="sampled", threshold=1 / 8, seed=seed)[2]
    one = gradients(hidden, weight, target, backward="sampled", threshold=1 / 8, seed=0)[2]
    assert relative_error(total / count, exact.double()) < 2 * relative_error(one, exact.double()) / count**0.5


@pytest.mark.parametrize("backward", MODES)
def test_gpu_linear_gives_the_same_bits_from_run_to_run(backward):
    made = factors(classes=50_000)
    made[2][::3] = -100
    for chunk_tokens in (None, 128):
        gradients(*made, backward=backward)  # so that each one comes after a call that ignored tokens
        results = [gradients(*made, backward=backward, seed=1, chunk_tokens=chunk_tokens) for _ in range(4)]
        for others in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("backward", MODES)
def test_gpu_linear_is_never_waited_for_where_all_tokens_count(backward, no_waiting, monkeypatch):
    from fastloss.torch import cuda_projection

    monkeypatch.setattr(cuda_projection, "_last", {})
    hidden, weight, target = factors()
    for reduction in ("mean", "none"):
        loss = fl.linear_cross_entropy(
            hidden, weight, target, linear_bias=weight[:, 0] * 1, backward=backward, reduction=reduction, chunk_tokens=128
        )
        loss.sum().backward()
    fl.linear_logit_stats(hidden, weight, target, want=("logprob", "entropy"), chunk_tokens=128).logprob.sum().backward()
    # No call asked for its own number, which would be no wait of PyTorch's.
    assert all(count.is_all() for count in cuda_projection._last.values())


def test_gpu_leaves_out_chunks_behind_the_last_token_that_counts():
    from fastloss.torch import cuda_projection

    hidden, weight, target = factors()
    target[torch.arange(700, device="cuda") % 4 != 0] = -100
    chunks = []
    logits = cuda_projection.Projection.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_projection, "_last", {})
        patch.setattr(
            cuda_projection.Projection, "logits", lambda self, tokens: (chunks.append(tokens), logits(self, tokens))[1]
        )
        first = gradients(hidden, weight, target, chunk_tokens=100)
        assert len(chunks) == 7
        torch.cuda.synchronize()
        chunks.clear()
        second = gradients(hidden, weight, target, chunk_tokens=100)
        assert len(chunks) == 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backward", MODES)
def test_gpu_graph_replays_a_linear_loss(backward):
    hidden, weight, target = factors()
    options = {"backward": backward, "seed": 5, "chunk_tokens": 256}

    def run():
        loss = fl.linear_cross_entropy(hidden, weight, target, **options)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    hidden.grad = weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        target[::7] = -100  # so many more than when the graph was made
    graph.replay()
    torch.cuda.synchronize()
    captured = [loss.detach().clone(), hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    again = run()
    for one, other in zip(captured, (again.detach(), hidden.grad, weight.grad), strict=True):
        assert torch.equal(one, other)


def test_gpu_graph_samples_anew_at_each_replay():
    hidden, weight, target = factors()
    options = {"backward": "sampled", "threshold": 1 / 4}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(hidden, weight, target, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, by_hidden, _ = gradients(hidden, weight, target, **options)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(by_hidden.clone())
    assert not torch.equal(*replays)


def test_gpu_linear_works_on_the_current_stream():
    hidden, weight, target = factors()
    expected = gradients(hidden, weight, target, backward="sampled", seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copy = (hidden.detach() * 1).requires_grad_()
        found = gradients(copy, weight, target, backward="sampled", seed=1)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backward", MODES)
def test_gpu_linear_token_of_an_id_out_of_range_is_nan(backward):
    hidden, weight, target = factors(tokens=6)
    target[1], target[4] = len(weight), -7
    losses = fl.linear_cross_entropy(hidden, weight, target, reduction="none", backward=backward)
    losses.sum().backward()
    bad = torch.tensor([False, True, False, False, True, False], device="cuda")
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(hidden.grad.isnan().any(-1), bad)


@pytest.mark.parametrize("backward", MODES)
def test_gpu_linear_memory_is_that_of_one_chunk(backward):
    tokens, classes, features, chunk = 4096, 64_000, 256, 256
    hidden, weight, target = factors(tokens, classes, features)
    gradients(hidden, weight, target, backward=backward, chunk_tokens=chunk)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(hidden, weight, target, backward=backward, chunk_tokens=chunk)
    used = torch.cuda.max_memory_allocated() - before
    of_chunk, of_hidden, of_weight = 2 * chunk * classes, 2 * tokens * features, 2 * classes * features
    entries = tokens * slots_of_token(1 / 64, classes, True)
    # The float32 sum, and its rounding; or what is kept, with the sort by classes.
    sums = 3 * of_weight if backward == "exact" else of_weight + 48 * entries
    assert used <= of_chunk + 6 * of_hidden + sums + (16 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one_does_the_linear_work():
    made = factors(tokens=40)
    other = [tensor.detach().to("cuda:1") for tensor in made]
    assert torch.cuda.current_device() == 0
    expected = gradients(*made, backward="sampled", seed=1)
    found = gradients(other[0].requires_grad_(), other[1].requires_grad_(), other[2], backward="sampled", seed=1)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to("cuda:0"), wanted)
