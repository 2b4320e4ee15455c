# SPDX-License-Identifier: Apache-2.0
"""All functions of `fastloss.torch` under `torch.func`, `vmap` and `torch.compile`."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch as fl  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402
from transform_helpers import (  # noqa: E402
    BACKENDS,
    CLASS_WEIGHT,
    CLASSES,
    FEATURES,
    FLOAT64,
    ON_EACH_DEVICE,
    TOKENS,
    compiled,
    each_function,
    example,
    gradient,
    linear,
)

pytestmark = ON_EACH_DEVICE


# ---- torch.func, and torch.compile around it ----


TRANSFORMS = {
    "grad": gradient,
    "grad_and_value": lambda f: torch.func.grad_and_value(lambda x, y: f(x, y).sum()),
    "vjp": lambda f: lambda x, y: torch.func.vjp(lambda x: f(x, y).square(), x)[1](2 * f(x, y))[0],
    "grad of grad": lambda f: torch.func.grad(lambda x, y: gradient(f)(x, y).square().sum()),
    "vmap": lambda f: lambda x, y: torch.vmap(f, (0, None))(torch.stack([x, 2 * x]), y),
    "vmap of grad": lambda f: lambda x, y: torch.vmap(gradient(f), (0, None))(torch.stack([x, 2 * x]), y),
    "grad of vmap": lambda f: gradient(lambda x, y: torch.vmap(f, (0, None))(torch.stack([x, 2 * x]), y)),
}


@each_function
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(transform, name):
    ours, theirs, x, y = example(name)
    actual, expected = (TRANSFORMS[transform](function)(x, y) for function in (ours, theirs))
    torch.testing.assert_close(actual, expected, **FLOAT64)


@each_function
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_functional_transforms(transform, name):
    if name == "linear sampled" and "vmap" in transform:
        pytest.skip("a compiled graph does not know how many entries a sample has")
    ours, theirs, x, y = example(name)
    actual = compiled(TRANSFORMS[transform](ours))(x, y)
    torch.testing.assert_close(actual, TRANSFORMS[transform](theirs)(x, y), **FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backend_compiles_gradients_of_samples(backend):
    x, y, w = seeded(3, TOKENS, FEATURES), seeded_ids(CLASSES, 3, TOKENS), seeded(FEATURES, CLASSES)

    def of_samples(function):
        return torch.vmap(torch.func.grad(lambda w, x, y: function(x @ w, y)), (None, 0, 0))

    actual = compiled(of_samples(fl.cross_entropy), backend)(w, x, y)
    torch.testing.assert_close(actual, of_samples(F.cross_entropy)(w, x, y), **FLOAT64)


@each_function
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_compiled_without_gradients(mode, name):
    ours, theirs, x, y = example(name)
    with mode():
        for backend in ("eager", "aot_eager"):
            torch.testing.assert_close(compiled(ours, backend)(x, y), theirs(x, y), **FLOAT64)


def test_a_compiled_module_without_gradients_gives_the_loss():
    module = fl.LinearCrossEntropyLoss(FEATURES, CLASSES, dtype=torch.float64)
    _, _, x, y = example("linear")
    with torch.no_grad():
        assert same_bits(compiled(module, "eager")(x, y), module(x, y))


# ---- vmap ----


def weighted(function):
    return lambda x, y: function(x, y, weight=CLASS_WEIGHT.to(x.device))


SAMPLES = {
    "mean": lambda function: function,
    "sum": lambda function: lambda x, y: function(x, y, reduction="sum"),
    "none": lambda function: lambda x, y: function(x, y, reduction="none"),
    "weight": weighted,
}


@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_vmap_over_single_rows(sample, kind):
    x, y = seeded(TOKENS, CLASSES), seeded_probabilities(TOKENS, CLASSES) if kind == "soft" else seeded_ids(CLASSES, TOKENS)
    for transform in (torch.vmap, lambda f: torch.vmap(torch.func.grad(f))):
        actual, expected = (transform(SAMPLES[sample](function))(x, y) for function in (fl.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(actual, expected, **FLOAT64)


@each_function
def test_vmap_over_no_samples(name):
    ours, theirs, x, y = example(name)
    x, y = torch.stack([x])[:0], torch.stack([y])[:0]
    torch.testing.assert_close(torch.vmap(ours)(x, y), torch.vmap(theirs)(x, y), check_dtype=False)
    torch.testing.assert_close(torch.vmap(gradient(ours))(x, y), x)


@pytest.mark.parametrize("argument", ["weight", "logit_bias"])
def test_vmap_over_class_weights_and_biases_is_a_loop(argument):
    x, y, values = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS), seeded(3, CLASSES, seed=3).abs()

    def loss(x, value):
        return fl.cross_entropy(x, y, **{argument: value})

    for function in (loss, torch.func.grad(loss)):
        actual = torch.vmap(function, (None, 0))(x, values)
        torch.testing.assert_close(actual, torch.stack([function(x, value) for value in values]), **FLOAT64)


def test_vmap_over_biases_of_statistics_is_a_loop():
    x, y, values = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS), seeded(3, CLASSES, seed=3)

    def total(x, value):
        return fl.logit_stats(x, y, bias=value).logprob.sum()

    for function in (total, torch.func.grad(total)):
        actual = torch.vmap(function, (None, 0))(x, values)
        torch.testing.assert_close(actual, torch.stack([function(x, value) for value in values]), **FLOAT64)


@each_function
def test_batched_upstream_gradients(name):
    results = []
    ours, theirs, x, y = example(name)
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y)
        results.append(torch.autograd.grad(loss, leaf, seeded(3, *loss.shape), is_grads_batched=True)[0])
    torch.testing.assert_close(*results, **FLOAT64)


# ---- class weights that need gradients ----


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "reduction": "none"}], ids=str)
def test_class_weights_of_probabilities_get_their_gradients(options, compiling):
    results = []
    for function in (fl.cross_entropy, F.cross_entropy):
        values = (seeded(TOKENS, CLASSES), seeded_probabilities(TOKENS, CLASSES), seeded(CLASSES, seed=3).abs())
        variables = [value.requires_grad_() for value in values]

        def loss(*variables, function=function):
            return function(*variables, **options)

        value = (compiled(loss) if compiling and function is fl.cross_entropy else loss)(*variables)
        grads = torch.autograd.grad(value.square().sum(), variables, create_graph=not compiling)
        again = () if compiling else torch.autograd.grad(sum(g.square().sum() for g in grads), variables)
        results.append((value, *grads, *again))
    torch.testing.assert_close(*results, **FLOAT64)


def test_class_weights_under_torch_func():
    x, q, values = seeded(TOKENS, CLASSES), seeded_probabilities(TOKENS, CLASSES), seeded(3, CLASSES, seed=3).abs()
    for transform in (
        lambda f: torch.vmap(torch.func.grad(lambda w: f(x, q, w))),
        lambda f: torch.func.grad(lambda w: torch.vmap(lambda w: f(x, q, w))(w).sum()),
    ):
        torch.testing.assert_close(transform(fl.cross_entropy)(values), transform(F.cross_entropy)(values), **FLOAT64)


def test_class_weights_of_class_ids_get_none():
    x, y, values = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS), seeded(3, CLASSES, seed=3).abs()
    with pytest.raises(ValueError, match="weight gets no gradient"):
        fl.cross_entropy(x, y, values[0].clone().requires_grad_())
    with pytest.raises(ValueError, match="weight gets no gradient"):
        torch.func.grad(lambda w: torch.vmap(lambda w: fl.cross_entropy(x, y, w))(w).sum())(values)


# ---- denominators that torch.compile does not know ----


@pytest.mark.parametrize("name", ["cross_entropy", "linear"])
def test_compiled_with_numbers_that_change(name):
    _, _, x, y = example(name)

    def loss(x, y, denominator):
        return (linear if name == "linear" else fl.cross_entropy)(x, y, denominator=denominator)

    function = compiled(loss)
    for denominator in (3.0, 4.0, 7.0):
        torch.testing.assert_close(function(x, y, denominator), loss(x, y, denominator), **FLOAT64)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function = compiled(lambda x, y, denominator: loss(x, y, denominator.item()))
        for denominator in (3.0, 4.0):
            actual = function(x, y, torch.tensor(denominator, dtype=torch.float64))
            torch.testing.assert_close(actual, loss(x, y, denominator), **FLOAT64)
        with pytest.raises(RuntimeError):
            function(x, y, torch.tensor(-1.0, dtype=torch.float64))


# ---- gradients that forward makes ----


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.3])
def test_transformed_gradients_of_bfloat16_are_rounded_once(upstream):
    hidden, weight = (seeded(*shape, scale=1.0, dtype=torch.bfloat16) for shape in ((40, 16), (60, 16)))
    target = seeded_ids(60, 40)

    def loss(hidden, weight, reduction="mean"):
        losses = fl.linear_cross_entropy(hidden, weight, target, reduction=reduction, chunk_tokens=40)
        return upstream * (losses.sum() / 40 if reduction == "none" else losses)

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    others = (
        torch.func.grad(loss, (0, 1))(hidden.detach(), weight.detach()),
        torch.autograd.grad(compiled(loss)(*leaves), leaves),
    )
    if hidden.is_cuda:
        pytest.skip("a GPU scales the gradients of 16 bits that forward has made")
    for one, other in ((one, other) for made in others for one, other in zip(grads, made, strict=True)):
        assert same_bits(one, other)


def test_a_checkpointed_linear_loss_keeps_no_gradients():
    hidden, weight = seeded(TOKENS, FEATURES).requires_grad_(), seeded(CLASSES, FEATURES, seed=1).requires_grad_()
    losses = []

    def loss(hidden):
        losses.append(fl.linear_cross_entropy(hidden, weight, seeded_ids(CLASSES, TOKENS)))
        return losses[-1]

    loss(hidden)
    assert losses[0].grad_fn.gradients is not None
    checkpoint(loss, hidden, use_reentrant=False)
    assert losses[1].grad_fn.gradients is None


# ---- rows that do not count ----


@pytest.mark.parametrize("name", ["cross_entropy", "linear"])
def test_second_derivatives_see_nothing_of_ignored_rows(name):
    ours, _, x, y = example(name)
    x[1], y[1] = torch.nan, -100
    rest = torch.tensor([0, 2, 3])
    matrix = seeded(CLASSES, FEATURES, seed=1).requires_grad_()

    def second(x, y):
        leaf = x.clone().requires_grad_()
        variables = (leaf, matrix) if name == "linear" else (leaf,)
        loss = fl.linear_cross_entropy(leaf, matrix, y) if name == "linear" else ours(leaf, y)
        grads = torch.autograd.grad(loss, variables, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), variables)

    (by_x, *by_matrix), (expected, *by_same_matrix) = second(x, y), second(x[rest], y[rest])
    assert torch.equal(by_x[1], torch.zeros_like(by_x[1]))
    torch.testing.assert_close([by_x[rest], *by_matrix], [expected, *by_same_matrix], **FLOAT64)
