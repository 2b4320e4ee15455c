# SPDX-License-Identifier: Apache-2.0
"""All functions of `fastloss.torch` under `torch.func`, `vmap`, `torch.compile` and forward mode."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastloss.torch as fl  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

pytestmark = [
    # torch.compile and forward mode use what PyTorch itself has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("device", "compiled_afresh"),
]

TOKENS, CLASSES, FEATURES = 4, 5, 3
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
BACKENDS = ("eager", "aot_eager", "inductor")


@pytest.fixture
def compiled_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


HEAD = seeded(CLASSES, FEATURES, seed=1, scale=1.0)
PROBABILITIES = seeded_probabilities(TOKENS, CLASSES)
CLASS_WEIGHT = seeded(CLASSES, seed=3).abs()


def linear(hidden, ids=None, **options):
    target = PROBABILITIES.to(hidden.device) if ids is None else ids
    return fl.linear_cross_entropy(hidden, HEAD.to(hidden.device), target, **options)


def plain_linear(hidden, ids=None, **options):
    target = PROBABILITIES.to(hidden.device) if ids is None else ids
    return F.cross_entropy(F.linear(hidden, HEAD.to(hidden.device)), target, **options)


def log_probability(logits, ids):
    return torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits):
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


# Name: number of features, our function of rows and class ids, and what it is in PyTorch.
NONE = {"reduction": "none"}
SAMPLED = {"backward": "sampled", "threshold": 1e-12, "seed": 1}  # leaves nothing out
FUNCTIONS = {
    "cross_entropy": (CLASSES, fl.cross_entropy, F.cross_entropy),
    "rows": (CLASSES, lambda x, y: fl.cross_entropy(x, y, **NONE), lambda x, y: F.cross_entropy(x, y, **NONE)),
    "selective_log_softmax": (CLASSES, fl.selective_log_softmax, log_probability),
    "entropy_from_logits": (CLASSES, lambda x, y: fl.entropy_from_logits(x), lambda x, y: entropy(x)),
    "linear": (FEATURES, linear, plain_linear),
    "linear tokens": (FEATURES, lambda h, y: linear(h, y, **NONE), lambda h, y: plain_linear(h, y, **NONE)),
    "linear sampled": (FEATURES, lambda h, y: linear(h, y, **SAMPLED), plain_linear),
    "linear soft": (FEATURES, lambda h, y: linear(h), lambda h, y: plain_linear(h)),
    "linear_logit_stats": (
        FEATURES,
        lambda h, y: fl.linear_logit_stats(h, HEAD.to(h.device), y).logprob,
        lambda h, y: log_probability(F.linear(h, HEAD.to(h.device)), y),
    ),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def example(name):
    features, ours, theirs = FUNCTIONS[name]
    return ours, theirs, seeded(TOKENS, features), seeded_ids(CLASSES, TOKENS)


# ---- torch.func, and torch.compile around it ----


def gradient(function):
    return torch.func.grad(lambda x, y: function(x, y).sum())


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


# ---- forward mode ----


@each_function
def test_tangents_of_dual_tensors(name):
    ours, theirs, x, y = example(name)
    tangents = []
    for function in (ours, theirs):
        with forward_ad.dual_level():
            loss = function(forward_ad.make_dual(x, seeded(*x.shape, seed=9)), y)
            tangents.append(forward_ad.unpack_dual(loss).tangent)
    torch.testing.assert_close(*tangents, **FLOAT64)


@each_function
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_jvp_and_hessian(compiling, name):
    ours, theirs, x, y = example(name)
    tangent = seeded(*x.shape, seed=9)
    for transform in (
        lambda f: lambda x: torch.func.jvp(lambda x: f(x, y), (x,), (tangent,)),
        lambda f: torch.func.hessian(lambda x: f(x, y)),
    ):
        actual = compiled(transform(ours)) if compiling else transform(ours)
        torch.testing.assert_close(actual(x), transform(theirs)(x), **FLOAT64)


def test_forward_mode_of_every_option_and_statistic():
    x, y = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS)
    y[1] = -100
    options = {"weight": seeded(CLASSES, seed=3).abs(), "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}
    statistics = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")

    def loss(x):
        return fl.cross_entropy(x, y, **options)

    def stats(x):
        return tuple(fl.logit_stats(x, y.clamp(min=0), want=statistics, temperature=0.7))

    for function in (loss, stats):
        value, tangent = torch.func.jvp(function, (x,), (seeded(*x.shape, seed=9),))
        torch.testing.assert_close(value, function(x), **FLOAT64)
        number = None if torch.is_tensor(value) else 6
        rows, back = torch.func.vjp(lambda x, f=function, n=number: f(x) if n is None else f(x)[:n], x)
        cotangent = torch.ones_like(rows) if number is None else tuple(map(torch.ones_like, rows))
        forward = tangent if number is None else sum(part.sum() for part in tangent[:number])
        torch.testing.assert_close(forward, (back(cotangent)[0] * seeded(*x.shape, seed=9)).sum(), **FLOAT64)


@pytest.mark.parametrize("call", ["cross_entropy", "logit_stats", "linear_cross_entropy", "linear_logit_stats"])
def test_ids_out_of_range_raise_in_forward_mode(call):
    x, wrong = (seeded(2, CLASSES), torch.tensor([0, CLASSES]))
    if call.startswith("linear"):
        x, head = seeded(2, FEATURES), HEAD
    functions = {
        "cross_entropy": lambda x: fl.cross_entropy(x, wrong),
        "logit_stats": lambda x: fl.logit_stats(x, wrong).logprob,
        "linear_cross_entropy": lambda x: fl.linear_cross_entropy(x, head, wrong),
        "linear_logit_stats": lambda x: fl.linear_logit_stats(x, head, wrong).logprob,
    }
    for transform in (lambda f: torch.func.jvp(f, (x,), (x,)), lambda f: torch.func.jacfwd(f)(x)):
        with pytest.raises(IndexError, match=r"target\[1\] = 5 is out of range for 5 classes"):
            transform(functions[call])


def test_numbers_in_tensors_under_torch_func():
    x, y = seeded(TOKENS, CLASSES), seeded_ids(CLASSES, TOKENS)
    options = {"label_smoothing": 0.1, "z_loss": 0.2, "temperature": 2.0}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
    found, expected = (torch.func.grad(lambda x, o=o: fl.cross_entropy(x, y, **o))(x) for o in (tensors, options))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["temperature", "z_loss", "softcap"])
def test_numbers_with_a_tangent_raise(name):
    with forward_ad.dual_level():
        number = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            fl.cross_entropy(seeded(2, CLASSES), torch.tensor([0, 1]), **{name: number})


@pytest.mark.parametrize("target", ["ids", "soft"])
def test_second_derivatives_and_tangents_of_logits_with_a_large_common_part(target):
    x = seeded(TOKENS, 300).float() + 1e4
    tangent = seeded(TOKENS, 300, seed=2).float()
    y = seeded_ids(300, TOKENS) if target == "ids" else seeded_probabilities(TOKENS, 300).float()

    def product(x, tangent, y):
        def loss(x):
            return fl.cross_entropy(x, y, label_smoothing=0.1)

        return torch.func.grad(lambda x: (torch.func.grad(loss)(x) * tangent).sum())(x), torch.func.jvp(loss, (x,), (tangent,))

    wide = [t.double() if t.is_floating_point() else t for t in (x, tangent, y)]
    found, exact = product(x, tangent, y), product(*wide)
    size = float(exact[0].abs().max())
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.0, atol=2e-6 * size)
    torch.testing.assert_close([t.double() for t in found[1]], list(exact[1]), rtol=1e-5, atol=1e-7)


def test_forward_mode_of_masked_classes_without_weight_is_finite():
    x = seeded(2, CLASSES)
    x[:, 1] = -math.inf
    weight, soft = torch.ones(CLASSES).double(), seeded_probabilities(2, CLASSES)
    weight[1] = soft[:, 1] = 0
    for given in ((soft,), (torch.tensor([1, 2]), weight), (torch.tensor([0, 2]), weight, None, -100, None, "mean", 0.3)):
        eager = fl.cross_entropy(x, *given)
        loss, tangent = torch.func.jvp(lambda x, given=given: fl.cross_entropy(x, *given), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(loss, eager)
        assert bool(torch.isfinite(tangent))


@pytest.mark.parametrize("mapped", [torch.func.vmap, None], ids=["vmap", "jvp"])
def test_means_of_nothing_are_those_of_eager_mode(mapped):
    x, y = seeded(2, CLASSES), torch.tensor([0, 1])
    nothing, unknown = torch.tensor([0.0, 0, 1, 1, 1]).double(), torch.tensor([math.nan, 1, 1, 1, 1]).double()
    for weight, ignored in ((nothing, -100), (unknown, 0)):
        options = {"weight": weight, "label_smoothing": 0.1 if ignored else 0.0, "ignore_index": ignored}
        if mapped is None:
            found, _ = torch.func.jvp(lambda x, o=options: fl.cross_entropy(x, y, **o), (x,), (x,))
        else:
            found = mapped(lambda x, o=options: fl.cross_entropy(x, y, **o))(x[None])[0]
        torch.testing.assert_close(found, fl.cross_entropy(x, y, **options), equal_nan=True)


def test_a_backward_with_a_tangent_raises():
    leaf = seeded(TOKENS, CLASSES).requires_grad_()
    loss = fl.cross_entropy(leaf, seeded_ids(CLASSES, TOKENS))
    one = torch.ones_like(loss)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="cross_entropy_backward has no derivative"),
    ):
        torch.autograd.grad(loss, leaf, forward_ad.make_dual(one, one))


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
