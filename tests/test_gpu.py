# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, several devices, no waiting, large tensors; and the contract there."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
import reference  # noqa: E402
from fastloss.torch import ahead  # noqa: E402
from helpers import assert_cross_entropy_contract  # noqa: E402
from reference import Options  # noqa: E402
from rows import KINDS, logits_and_target  # noqa: E402
from torch_helpers import TORCH_DTYPES, array, nothing_made_ahead, watched_trips  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(logits):
    """A leaf on the GPU with the bits of a NumPy array, bfloat16 included."""
    if logits.dtype.name == "bfloat16":
        tensor = torch.from_numpy(logits.view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(logits.copy())
    return tensor.cuda().requires_grad_()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"softcap": 5.0, "temperature": 0.7}])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 33, 1000, 9001, 150_001])
def test_gpu_keeps_the_contract(classes, kind, dtype, options):
    if kind == "masked" and "label_smoothing" in options:
        pytest.skip("infinite, as its formula")
    if classes == 1 and (kind == "confident" or "z_loss" in options):
        pytest.skip("no other class; of z-loss too little is left beside what cancels")
    logits, target = logits_and_target(kind, classes, dtype)
    leaf = on_gpu(logits)
    loss = fl.cross_entropy(leaf, torch.from_numpy(target).cuda(), **options)
    loss.backward()
    assert_cross_entropy_contract(array(loss), array(leaf.grad), logits, target, Options(**options))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_gpu_takes_rows_side_by_side(dtype):
    leaf = torch.randn(2, 300, 7, 9, dtype=TORCH_DTYPES[dtype], device="cuda").requires_grad_()
    target = torch.randint(300, (2, 7, 9), device="cuda")
    loss = fl.cross_entropy(leaf, target)
    loss.backward()
    rows, gradient = (reference.as_rows(array(x), 1) for x in (leaf, leaf.grad))
    assert_cross_entropy_contract(array(loss), gradient, rows, array(target).reshape(-1))


def test_gpu_statistics_are_those_of_the_cpu():
    logits = torch.randn(40, 5001)
    ids = torch.randint(5001, (40, 3))
    want = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")
    for ours, cpu in zip(
        fl.logit_stats(logits.cuda(), ids.cuda(), want=want), fl.logit_stats(logits, ids, want=want), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=2e-6, atol=2e-6)


def test_gpu_is_never_waited_for(no_waiting):
    leaf = torch.randn(64, 5000, device="cuda", requires_grad=True)
    target = torch.randint(5000, (64,), device="cuda")
    for reduction in ("mean", "sum"):
        fl.cross_entropy(leaf, target, reduction=reduction).backward()
        (fl.cross_entropy(leaf, target, reduction=reduction) * 0.5).backward()
    for inplace in (True, "backward"):
        fl.cross_entropy(leaf * 2, target, inplace=inplace).backward()
    fl.logit_stats(leaf, target, want=("logprob", "entropy", "rank"))


def test_gpu_gives_the_same_bits_from_run_to_run():
    leaf = torch.randn(500, 30_001, device="cuda", requires_grad=True)
    target = torch.randint(30_001, (500,), device="cuda")
    results = []
    for _ in range(3):
        loss = fl.cross_entropy(leaf, target, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_gpu_works_on_the_current_stream():
    leaf = torch.randn(2000, 20_000, device="cuda", requires_grad=True)
    target = torch.randint(20_000, (2000,), device="cuda")
    expected = fl.cross_entropy(leaf, target)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copy = (leaf.detach() + 1 - 1).requires_grad_()
        loss = fl.cross_entropy(copy, target)
        (grad,) = torch.autograd.grad(loss, copy)
    stream.synchronize()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_gpu_graph_replays_forward_and_backward():
    logits = torch.randn(300, 10_007, device="cuda", requires_grad=True)
    target = torch.randint(10_007, (300,), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fl.cross_entropy(logits, target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fl.cross_entropy(logits, target)
        loss.backward()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    torch.cuda.synchronize()
    captured, captured_grad = loss.clone(), logits.grad.clone()
    logits.grad = None
    again = fl.cross_entropy(logits, target)
    again.backward()
    assert torch.equal(captured, again)
    assert torch.equal(captured_grad, logits.grad)


# ---- gradients made in forward ----


@pytest.fixture
def expectation():
    """As at the start of a process."""
    ahead._of_gpus.clear()
    return ahead.expectation_of(torch.empty(0, device="cuda"))


def same_bits(one, other):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def problem(rows=300, classes=10_007, dtype=torch.float32):
    logits = (3 * torch.randn(rows, classes, device="cuda")).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,), device="cuda")


def loss_and_gradient(logits, target, factor=1.0, **options):
    loss = fl.cross_entropy(logits, target, **options) * factor
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def in_two_trips(expectation, *arguments, **options):
    with nothing_made_ahead(expectation):
        return loss_and_gradient(*arguments, **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(9, 33), (300, 9001), (2000, 40_000), (2, 150_001)])
def test_gpu_bits_depend_on_nothing_that_was_expected(rows, classes, dtype, options, expectation):
    logits, target = problem(rows, classes, TORCH_DTYPES[dtype])
    for factor in (1.0, 1.0, 0.3, 0.3, 0.3, 0.0, float("nan"), 0.3, 2.0):
        expected = in_two_trips(expectation, logits, target, factor, **options)
        assert all(map(same_bits, loss_and_gradient(logits, target, factor, **options), expected))


def test_gpu_expects_the_scale_of_a_loss_once_it_came_twice(expectation, monkeypatch):
    logits, target = problem()
    trips = watched_trips(monkeypatch)
    for factor in (1.0, 0.25, 0.25, 0.25, 0.0, 0.25, 0.25):
        (fl.cross_entropy(logits, target) * factor).backward()
        torch.cuda.synchronize()  # so that the host has heard
    backwards, forwards = trips[1::2], trips[::2]
    assert backwards == ["kept", "made", "made", "kept", "made", "made", "kept"]
    assert forwards == ["both", "both", "forward", "both", "both", "forward", "both"]


def test_gpu_makes_no_gradient_for_a_while_after_one_that_no_backward_came_for(expectation, no_waiting):
    logits, target = problem()
    loss = fl.cross_entropy(logits, target)
    assert expectation.steady
    del loss
    assert not expectation.steady
    for _ in range(ahead.AFTER_NOTHING):
        fl.cross_entropy(logits, target).backward()
    assert expectation.steady


def test_gpu_losses_that_wait_for_one_backward_keep_one_large_gradient(expectation, monkeypatch):
    logits, target = problem()
    monkeypatch.setattr(ahead, "RECYCLED_FROM", logits.nbytes)
    trips = watched_trips(monkeypatch)
    sum(fl.cross_entropy(logits * i, target) for i in range(3)).backward()
    assert sorted(trips) == ["both", "forward", "forward", "kept", "made", "made"]


def test_gpu_gradients_of_a_grad_scaler_have_the_bits_of_two_trips(expectation):
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
    logits, target = problem(dtype=torch.float32)
    optimizer = torch.optim.SGD([logits], lr=0.0)
    for step in range(8):
        if step == 5:
            logits.grad = None
            scaler.scale(fl.cross_entropy(logits, target) * float("inf")).backward()  # halves the scale
            scaler.step(optimizer)
            scaler.update()
        scale = scaler.get_scale()
        logits.grad = None
        scaler.scale(fl.cross_entropy(logits, target)).backward()
        assert same_bits(logits.grad, in_two_trips(expectation, logits, target, scale)[1])
        scaler.step(optimizer)
        scaler.update()


def replayed(graph, loss, logits):
    logits.grad.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return loss.clone(), logits.grad.clone()


@pytest.mark.parametrize("known", [True, False], ids=["expectation", "no expectation"])
def test_gpu_graph_replays_with_the_scale_of_each_replay(known, expectation):
    logits, target = problem()
    scale = torch.ones((), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (fl.cross_entropy(logits, target) * scale).backward()
    torch.cuda.current_stream().wait_stream(stream)
    logits.grad = None
    if not known:
        ahead._of_gpus.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fl.cross_entropy(logits, target) * scale
        loss.backward()
    assert bool(ahead._of_gpus) == known
    results = []
    for factor in (1.0, 0.25, 0.25, -3.0, 0.0, 1.0):
        scale.fill_(factor)
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
        results.append((factor, logits.detach().clone(), replayed(graph, loss, logits)))
    for factor, values, found in results:
        assert all(map(same_bits, found, in_two_trips(expectation, values.requires_grad_(), target, factor)))


def test_gpu_graphs_of_forward_and_backward_replay_apart(expectation):
    logits, target = problem()
    module = torch.cuda.make_graphed_callables(fl.CrossEntropyLoss(), (torch.randn_like(logits, requires_grad=True), target))
    for factor in (1.0, 0.5, 0.5, 3.0):
        loss = module(logits, target) * factor
        (grad,) = torch.autograd.grad(loss, logits)
        expected = in_two_trips(expectation, logits, target, factor)
        assert all(map(same_bits, (loss, grad), expected))


def test_gpu_streams_with_other_scales_do_not_disturb_each_other(expectation):
    problems = [problem(500, 20_011) for _ in range(3)]
    factors = (1.0, 0.25, 7.0)
    expected = [in_two_trips(expectation, *p, factor)[1] for p, factor in zip(problems, factors, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found = [[] for _ in problems]
    for _ in range(10):
        expectation._surprised.zero_()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(loss_and_gradient(*problems[i], factors[i])[1])
    torch.cuda.synchronize()
    for grads, one in zip(found, expected, strict=True):
        assert all(same_bits(grad, one) for grad in grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one_does_the_work():
    logits = torch.randn(30, 1000, device="cuda:1")
    target = torch.randint(1000, (30,), device="cuda:1")
    assert torch.cuda.current_device() == 0
    loss = fl.cross_entropy(logits, target)
    assert loss.device == logits.device
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(loss.cpu(), fl.cross_entropy(logits.cpu(), target.cpu()))


def test_gpu_takes_more_than_2_31_elements():
    rows, classes = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 9
    target = torch.full((rows,), classes - 1, device="cuda")
    losses = fl.cross_entropy(logits, target, reduction="none")
    expected = fl.cross_entropy(logits[-2:].float().cpu(), target[-2:].cpu(), reduction="none")
    torch.testing.assert_close(losses[-2:].cpu(), expected)


def test_gpu_row_of_an_id_out_of_range_is_nan():
    leaf = torch.randn(5, 1000, device="cuda", requires_grad=True)
    target = torch.tensor([0, 1000, -1, 999, 5], device="cuda")
    losses = fl.cross_entropy(leaf, target, reduction="none")
    losses.sum().backward()
    bad = torch.tensor([False, True, True, False, False], device="cuda")
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(leaf.grad.isnan().all(-1), bad)
    assert torch.equal(leaf.grad.isnan().any(-1), bad)


def test_gpu_compiles_without_a_graph_break():
    loss = torch.compile(lambda x, y: fl.cross_entropy(x, y, label_smoothing=0.1), fullgraph=True)
    leaf = torch.randn(50, 1003, device="cuda", requires_grad=True)
    target = torch.randint(1003, (50,), device="cuda")
    (grad,) = torch.autograd.grad(loss(leaf, target), leaf)
    eager = torch.autograd.grad(fl.cross_entropy(leaf, target, label_smoothing=0.1), leaf)[0]
    torch.testing.assert_close(grad, eager)


def test_gpu_vmap_is_a_loop_over_its_samples():
    logits, target = torch.randn(4, 6, 50, device="cuda"), torch.randint(50, (4, 6), device="cuda")
    ours = torch.func.vmap(fl.cross_entropy)(logits, target)
    torch.testing.assert_close(ours, torch.stack([fl.cross_entropy(x, y) for x, y in zip(logits, target, strict=True)]))
