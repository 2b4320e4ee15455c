# SPDX-License-Identifier: Apache-2.0
"""The operators of fastloss as PyTorch wants them, and the public functions under `torch.compile` and `torch.export`."""

import warnings

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch  # noqa: E402
from torch_helpers import OPTIONS, STATISTICS, here, same_bits, seeded, seeded_ids, seeded_probabilities, target_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

ours = fastloss.torch.cross_entropy


# ---- operators ----


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


# ---- compilation ----


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
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}], ids=str
)
def test_legacy_arguments_compile(legacy):
    logits, target = seeded(4, 5), seeded_ids(5, 4)
    compiled = torch.compile(lambda x, y: ours(x, y, **legacy), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same_bits(compiled(logits, target), ours(logits, target, **legacy))
    torch._dynamo.reset()


def test_compiled_with_integers_that_change():
    logits, hidden, weight, target = seeded(4, 5), seeded(4, 3), seeded(5, 3, seed=1), seeded_ids(5, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    linear = torch.compile(fastloss.torch.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for number in (1, 2, 3):
        options = {"ignore_index": number - 1, "dim": -1}
        assert same_bits(compiled(logits, target, **options), ours(logits, target, **options))
        chunked = {"chunk_tokens": number}
        expected = fastloss.torch.linear_cross_entropy(hidden, weight, target, **chunked)
        assert same_bits(linear(hidden, weight, target, **chunked), expected)
    torch._dynamo.reset()


def test_export_keeps_the_loss():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return ours(x * 2, y)

    logits, target = seeded(4, 5), seeded_ids(5, 4)
    program = torch.export.export(Model(), (logits, target))
    assert same_bits(program.module()(logits, target), ours(logits * 2, target))
