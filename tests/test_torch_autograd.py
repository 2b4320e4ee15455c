# SPDX-License-Identifier: Apache-2.0
"""Autograd and the systems around it: second derivatives, functional transforms, checkpoints, autocast, workers."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch  # noqa: E402
from torch_helpers import (  # noqa: E402
    BIAS,
    OPTIONS,
    STATISTICS,
    here,
    same_bits,
    seeded,
    seeded_ids,
    seeded_probabilities,
    target_of,
)

pytestmark = pytest.mark.usefixtures("device")

ours, theirs = fastloss.torch.cross_entropy, F.cross_entropy
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
SHAPES = {"rows": (4, 5), "one row": (5,), "places": (2, 5, 3)}


# ---- derivatives against finite differences ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, soft, shape):
    logits, target = seeded(*SHAPES[shape], scale=1.5).requires_grad_(), target_of(SHAPES[shape], soft)
    assert torch.autograd.gradcheck(lambda x, y: ours(x, y, **here(OPTIONS[name])), (logits, target))


# A backward that is differentiable once only returned wrong gradient penalties without an error.
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradgradcheck(name, soft, shape):
    logits, target = seeded(*SHAPES[shape], scale=1.5).requires_grad_(), target_of(SHAPES[shape], soft)
    assert torch.autograd.gradgradcheck(lambda x, y: ours(x, y, **here(OPTIONS[name])), (logits, target))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "temperature": 0.7, "bias": BIAS}], ids=["plain", "softcap"])
def test_gradcheck_and_gradgradcheck_of_statistics(transform, name):
    logits, target = seeded(4, 5, scale=1.5).requires_grad_(), seeded_ids(5, 4)

    def statistic(x):
        return getattr(fastloss.torch.logit_stats(x, target, want=(name,), **here(transform)), name)

    assert torch.autograd.gradcheck(statistic, (logits,))
    assert torch.autograd.gradgradcheck(statistic, (logits,))


def penalty(function, logits, target, **options):
    """The gradient of a gradient penalty."""
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, target, **options), leaf, create_graph=True)
    (function(leaf, target, **options) + (gradient**2).sum()).backward()
    return leaf.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_gradient_penalty_is_that_of_pytorch(soft, smoothing):
    logits = seeded(6, 50)
    target = seeded_probabilities(6, 50) if soft else seeded_ids(50, 6)
    options = {"label_smoothing": smoothing}
    torch.testing.assert_close(penalty(ours, logits, target, **options), penalty(theirs, logits, target, **options), **FLOAT64)


def test_gradient_penalty_of_masked_logits_is_finite():
    logits = seeded(4, 9)
    logits[:, :3] = -torch.inf
    gradient = penalty(ours, logits, torch.tensor([3, 4, 5, 8]))
    assert torch.all(torch.isfinite(gradient))
    rest = penalty(theirs, logits[:, 3:], torch.tensor([0, 1, 2, 5]))
    torch.testing.assert_close(gradient[:, 3:], rest, **FLOAT64)


# ---- the graph ----


def test_retain_graph_gives_the_same_gradient_twice():
    logits = seeded(6, 50).requires_grad_()
    loss = ours(logits, seeded_ids(50, 6))
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert same_bits(first, second)


def test_second_backward_without_retain_graph_raises():
    logits = seeded(6, 50).requires_grad_()
    loss = ours(logits, seeded_ids(50, 6))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate_in_grad():
    logits, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    ours(logits, target).backward()
    once = logits.grad.clone()
    ours(logits, target).backward()
    torch.testing.assert_close(logits.grad, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant):
    logits, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    (expected,) = torch.autograd.grad(ours(logits * 2, target), logits)
    loss = checkpoint(lambda x: ours(x * 2, target), logits, use_reentrant=reentrant)
    loss.backward()
    assert same_bits(logits.grad, expected)


def saved_bytes(function):
    """What autograd keeps between forward and backward, each storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_saves_the_logits_and_a_few_numbers_a_row(dtype):
    logits, target = seeded(100, 5000, dtype=dtype).requires_grad_(), seeded_ids(5000, 100)
    assert saved_bytes(lambda: ours(logits, target)) <= logits.nbytes + 100 * 64


def test_writing_to_the_logits_before_backward_is_reported():
    leaf = seeded(6, 50).requires_grad_()
    logits = leaf * 1
    loss = ours(logits, seeded_ids(50, 6))
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_writing_to_the_target_before_backward_is_reported():
    logits, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    loss = ours(logits, target)
    target.add_(1).remainder_(50)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_works():
    logits = seeded(6, 50).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        ours(logits, seeded_ids(50, 6)).backward()
    assert logits.grad is not None


def test_gradient_in_another_python_thread_is_the_same():
    from threading import Thread

    logits, target = seeded(6, 50).requires_grad_(), seeded_ids(50, 6)
    (expected,) = torch.autograd.grad(ours(logits, target), logits)
    found = []
    thread = Thread(target=lambda: found.extend(torch.autograd.grad(ours(logits, target), logits)))
    thread.start()
    thread.join()
    assert same_bits(found[0], expected)


# ---- functional transforms ----


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_func_grad_is_autograd(reduction, soft):
    logits = seeded(6, 50)
    target = seeded_probabilities(6, 50) if soft else seeded_ids(50, 6)
    actual = torch.func.grad(ours)(logits, target, reduction=reduction)
    torch.testing.assert_close(actual, torch.func.grad(theirs)(logits, target, reduction=reduction), **FLOAT64)


def test_func_grad_by_soft_targets_is_autograd():
    logits, target = seeded(6, 50), seeded_probabilities(6, 50)
    actual = torch.func.grad(ours, argnums=1)(logits, target)
    torch.testing.assert_close(actual, torch.func.grad(theirs, argnums=1)(logits, target), **FLOAT64)


def test_func_vjp_is_autograd():
    logits, target = seeded(6, 50), seeded_ids(50, 6)
    value, pull_back = torch.func.vjp(lambda x: ours(x, target, reduction="none"), logits)
    expected, expected_pull_back = torch.func.vjp(lambda x: theirs(x, target, reduction="none"), logits)
    torch.testing.assert_close(value, expected, **FLOAT64)
    torch.testing.assert_close(pull_back(seeded(6))[0], expected_pull_back(seeded(6))[0], **FLOAT64)


def test_func_hessian_by_reverse_mode_is_that_of_pytorch():
    logits, target = seeded(2, 4), seeded_ids(4, 2)
    actual = torch.func.jacrev(torch.func.jacrev(lambda x: ours(x, target)))(logits)
    expected = torch.func.jacrev(torch.func.jacrev(lambda x: theirs(x, target)))(logits)
    torch.testing.assert_close(actual, expected, **FLOAT64)


def test_grad_of_grad_is_that_of_pytorch():
    logits, target = seeded(6, 50), seeded_ids(50, 6)

    def norm(function):
        return torch.func.grad(lambda x: (torch.func.grad(lambda y: function(y, target))(x) ** 2).sum())(logits)

    torch.testing.assert_close(norm(ours), norm(theirs), **FLOAT64)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (2, 1), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_vmap_is_a_loop(soft, in_dims, reduction):
    samples = [seeded(4, 9, seed=i) for i in range(3)]
    targets = [seeded_probabilities(4, 9, seed=i) if soft else seeded_ids(9, 4, seed=i) for i in range(3)]
    logits = samples[0] if in_dims[0] is None else torch.stack(samples, in_dims[0])
    target = targets[0] if in_dims[1] is None else torch.stack(targets, in_dims[1])
    actual = torch.vmap(lambda x, y: ours(x, y, reduction=reduction), in_dims)(logits, target)
    expected = torch.stack(
        [
            theirs(samples[0 if in_dims[0] is None else i], targets[0 if in_dims[1] is None else i], reduction=reduction)
            for i in range(3)
        ]
    )
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": seeded(9, seed=3).abs() + 0.1}], ids=str)
def test_per_sample_gradients_are_a_loop(options):
    model_weight = seeded(9, 7, scale=1.0)
    x, y = seeded(5, 3, 7), seeded_ids(9, 5, 3)
    options = here(options)

    def loss(function, w, x, y):
        return function(x @ w.T, y, **options)

    actual = torch.vmap(torch.func.grad(lambda w, x, y: loss(ours, w, x, y)), (None, 0, 0))(model_weight, x, y)
    expected = [torch.func.grad(lambda w, i=i: loss(theirs, w, x[i], y[i]))(model_weight) for i in range(5)]
    torch.testing.assert_close(actual, torch.stack(expected), **FLOAT64)


@pytest.mark.parametrize("name", STATISTICS)
def test_vmap_of_statistics_and_their_gradients_is_a_loop(name):
    logits, target = seeded(3, 4, 9), seeded_ids(9, 3, 4)

    def total(x, y):
        return getattr(fastloss.torch.logit_stats(x, y, want=(name,)), name).sum()

    actual = torch.vmap(torch.func.grad(total))(logits, target)
    expected = torch.stack([torch.func.grad(total)(logits[i], target[i]) for i in range(3)])
    torch.testing.assert_close(actual, expected, **FLOAT64)


def test_vmap_in_a_batch_with_an_ignored_sample_is_a_loop():
    logits, target = seeded(3, 4, 9), seeded_ids(9, 3, 4)
    target[1] = -100
    target[2, 0] = -100
    actual = torch.vmap(torch.func.grad(lambda x, y: ours(x, y, reduction="sum")))(logits, target)
    expected = [torch.func.grad(lambda x, i=i: theirs(x, target[i], reduction="sum"))(logits[i]) for i in range(3)]
    torch.testing.assert_close(actual, torch.stack(expected), **FLOAT64)


# ---- autocast ----


def test_under_autocast_the_loss_is_of_the_logits_as_they_come(device):
    x, w, y = seeded(6, 8, dtype=torch.float32), seeded(50, 8, dtype=torch.float32).requires_grad_(), seeded_ids(50, 6)
    with torch.autocast(device, torch.bfloat16):
        logits = F.linear(x, w)
        loss = ours(logits, y)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert same_bits(loss, ours(logits.detach(), y))
    loss.backward()
    assert w.grad.dtype == torch.float32
    assert torch.all(torch.isfinite(w.grad))


# ---- processes and subclasses ----


class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return ours(seeded(64, 5000, seed=i, dtype=torch.float32), seeded_ids(5000, 64, seed=i))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_compute_the_same(context, device):
    if device != "cpu" and context == "fork":
        pytest.skip("CUDA does not live on in a forked process")
    dataset = Losses()
    expected = torch.stack([dataset[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=60)
    assert same_bits(torch.cat(list(loader)), expected)


def test_parameters_are_logits_too():
    parameter = torch.nn.Parameter(seeded(4, 5))
    ours(parameter, seeded_ids(5, 4)).backward()
    torch.testing.assert_close(parameter.grad, torch.func.grad(theirs)(seeded(4, 5), seeded_ids(5, 4)), **FLOAT64)


def test_tensor_subclasses_go_through_their_own_dispatch():
    class Logged(torch.Tensor):
        pass

    logits = seeded(4, 5).as_subclass(Logged)
    torch.testing.assert_close(
        ours(logits, seeded_ids(5, 4)).as_subclass(torch.Tensor), theirs(seeded(4, 5), seeded_ids(5, 4)), **FLOAT64
    )
