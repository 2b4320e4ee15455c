# SPDX-License-Identifier: Apache-2.0
"""Autograd and the systems around it: second derivatives, functional transforms, compilation, checkpoints."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch  # noqa: E402
from torch_helpers import here, same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

# torch.compile itself makes an instance of the class that it says must have none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.usefixtures("device"),
]

ours, theirs = fastloss.torch.cross_entropy, F.cross_entropy
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
WEIGHT, BIAS = seeded(5, seed=3).abs() + 0.1, seeded(5, seed=4, scale=1.0)

OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "weight and smoothing": {"weight": WEIGHT, "label_smoothing": 0.2},
    "extras": {"z_loss": 0.1, "softcap": 3.0, "temperature": 0.7, "logit_bias": BIAS},
    "denominator": {"denominator": 3.0},
    "everything": {
        "weight": WEIGHT,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "softcap": 3.0,
        "temperature": 0.7,
        "logit_bias": BIAS,
    },
}
SHAPES = {"rows": (4, 5), "one row": (5,), "places": (2, 5, 3)}


def target_of(shape, soft):
    dim = 1 if len(shape) > 1 else 0
    if soft:
        return seeded_probabilities(*shape, dim=dim).requires_grad_()
    ids = seeded_ids(5, *shape[:dim], *shape[dim + 1 :])
    if ids.numel() > 2:
        ids.view(-1)[1] = -100
    return ids


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


STATISTICS = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob")


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


# ---- operators and compilation ----


def operators():
    names = torch.ops.fastloss._dir if hasattr(torch.ops.fastloss, "_dir") else []
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastloss::")
    }
    return sorted(registered | set(names))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the calls of the operators of fastloss."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastloss":
            copies = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.append((function, copies, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


def recorded_calls():
    """At least one call of every operator, as the public functions make it."""
    with Calls() as mode:
        for options in map(here, OPTIONS.values()):
            ours(seeded(4, 5).requires_grad_(), seeded_ids(5, 4), **options).sum().backward()
            soft = seeded_probabilities(4, 5).requires_grad_()
            ours(seeded(4, 5).requires_grad_(), soft, **options).sum().backward()
        ours(seeded(4, 5).requires_grad_() * 1, seeded_ids(5, 4), inplace=True).backward()
        stats = fastloss.torch.logit_stats(seeded(4, 5).requires_grad_(), seeded_ids(5, 4), want=STATISTICS)
        sum(getattr(stats, name).sum() for name in STATISTICS).backward()
        linear = fastloss.torch.linear_cross_entropy
        for options in ({}, {"reduction": "none"}, {"backward": "sampled", "threshold": 0.25, "seed": 1}):
            for target in (seeded_ids(5, 4), seeded_probabilities(4, 5)):
                factors = linear_factors()
                torch.autograd.grad(linear(*factors, target, **options).sum(), factors, create_graph=True)
        soft = seeded_probabilities(4, 5).requires_grad_()
        torch.autograd.grad(linear(*linear_factors(), soft), soft, create_graph=True)
        stats = fastloss.torch.linear_logit_stats(*linear_factors(), seeded_ids(5, 4), want=STATISTICS)
        sum(getattr(stats, name).sum() for name in STATISTICS).backward()
    return mode.calls


def linear_factors():
    return seeded(4, 3).requires_grad_(), seeded(5, 3, seed=1).requires_grad_()


def test_every_registered_operator_is_called_by_the_public_functions():
    assert operators() == sorted({function._schema.name.split("::")[1] for function, _, _ in recorded_calls()})


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    calls = [c for c in recorded_calls() if c[0]._schema.name == f"fastloss::{name}"]
    assert calls
    for function, args, kwargs in calls:
        torch.library.opcheck(function, args, kwargs)


@pytest.fixture
def compiled():
    """torch.compile into one graph; with the eager compiler behind it, so that no C++ compiler is needed."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_in_one_graph_it_gives_the_same_bits(name, soft, compiled):
    options = here(OPTIONS[name])

    def loss(x, y):
        return ours(x * 2, y, **options).sum()

    results = []
    for function in (loss, compiled(loss)):
        logits, target = seeded(4, 5).requires_grad_(), target_of((4, 5), soft)
        value = function(logits, target)
        value.backward()
        results.append([value, logits.grad, *([target.grad] if soft else [])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_compiled_with_dynamic_shapes_it_gives_the_same_bits(compiled):
    function = compiled(lambda x, y: ours(x, y), dynamic=True)
    for count in (3, 4, 9):
        logits, target = seeded(count, 5), seeded_ids(5, count)
        assert same_bits(function(logits, target), ours(logits, target))


def test_compiled_statistics_give_the_same_bits(compiled):
    def statistics(x, y):
        stats = fastloss.torch.logit_stats(x, y, want=(*STATISTICS, "argmax", "rank"))
        return tuple(value for value in stats if value is not None)

    logits, target = seeded(4, 5), seeded_ids(5, 4)
    for one, other in zip(compiled(statistics)(logits, target), statistics(logits, target), strict=True):
        assert same_bits(one, other)


def test_compiled_gradient_of_statistics_is_the_same(compiled):
    def loss(x, y):
        stats = fastloss.torch.logit_stats(x, y, want=STATISTICS)
        return sum((i + 1) * getattr(stats, name).sum() for i, name in enumerate(STATISTICS))

    gradients = []
    for function in (loss, compiled(loss)):
        logits = seeded(4, 5).requires_grad_()
        function(logits, seeded_ids(5, 4)).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


def test_compiled_module_gives_the_same_bits(compiled):
    module = fastloss.torch.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.1)
    logits, target = seeded(4, 5), seeded_ids(5, 4)
    assert same_bits(compiled(module)(logits, target), module(logits, target))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_compiled_by_inductor_it_trains_the_same():
    torch._dynamo.reset()

    def loss(x, w, y):
        return ours(x @ w, y)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        w = seeded(7, 50, scale=1.0).requires_grad_()
        value = function(seeded(6, 7), w, seeded_ids(50, 6))
        value.backward()
        results.append((value.detach(), w.grad))
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)


def test_export_keeps_the_loss():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return ours(x * 2, y)

    logits, target = seeded(4, 5), seeded_ids(5, 4)
    program = torch.export.export(Model(), (logits, target))
    assert same_bits(program.module()(logits, target), ours(logits * 2, target))


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
