# SPDX-License-Identifier: Apache-2.0
"""`fastloss.torch.linear_cross_entropy` over `F.linear` and a cross-entropy in float64, and what it promises of its work."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

import fastloss.torch  # noqa: E402
from linear_helpers import (  # noqa: E402
    CLASS_WEIGHT,
    CLASSES,
    FEATURES,
    FLOAT64,
    OPTIONS,
    TOKENS,
    assert_same_gradients,
    factors,
    on_each_device,
    reference,
    targets,
)
from torch_helpers import STATISTICS, here, same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

ours = fastloss.torch.linear_cross_entropy
REDUCTIONS = ("mean", "sum", "none")
needs_that_of_pytorch = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs PyTorch 2.13")


# ---- values and gradients ----


@on_each_device
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ids", "ignored", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_linear_and_cross_entropy(name, kind, reduction, chunk_tokens):
    hidden, weight, bias = factors()
    target, options = targets(kind), here(OPTIONS[name]) | {"reduction": reduction}
    loss = ours(hidden, weight, target, linear_bias=bias, chunk_tokens=chunk_tokens, **options)
    expected = reference(hidden, weight, bias, target, **options)
    upstream = seeded(*expected.shape, seed=9) if expected.ndim else torch.tensor(-1.7, dtype=torch.float64)
    assert_same_gradients(loss, expected, (hidden, weight, bias), upstream)


CALLS = {
    "one token": ((FEATURES,), (CLASSES, FEATURES), ()),
    "tokens": ((4, FEATURES), (CLASSES, FEATURES), (4,)),
    "one place": ((4, FEATURES), (CLASSES, 3, FEATURES), (4, 3)),
    "two dimensions of places": ((4, FEATURES), (CLASSES, 3, 2, FEATURES), (4, 3, 2)),
}


@needs_that_of_pytorch
@on_each_device
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_pytorch_is_taken(call, reduction, soft):
    input_shape, weight_shape, target_shape = CALLS[call]
    hidden = seeded(*input_shape, scale=1.0).requires_grad_()
    weight = seeded(*weight_shape, seed=1, scale=1.0).requires_grad_()
    bias = seeded(*weight_shape[:-1], seed=2).requires_grad_()
    target = seeded_ids(CLASSES, *target_shape)
    if soft:
        shape = (*input_shape[:-1], *weight_shape[:-1])
        target = seeded_probabilities(*shape, dim=len(input_shape) - 1)
    elif target.numel() > 1:
        target.view(-1)[1] = -100
    options = here({"linear_bias": bias, "weight": CLASS_WEIGHT, "label_smoothing": 0.1, "reduction": reduction})
    expected = F.linear_cross_entropy(hidden, weight, target, **options)
    assert_same_gradients(ours(hidden, weight, target, **options), expected, (hidden, weight, bias))


@needs_that_of_pytorch
def test_its_arguments_start_with_those_of_pytorch():
    theirs = list(inspect.signature(F.linear_cross_entropy).parameters.values())
    mine = inspect.signature(ours).parameters
    for parameter in theirs:
        assert mine[parameter.name].kind == parameter.kind
        assert mine[parameter.name].default == parameter.default


@needs_that_of_pytorch
def test_options_of_pytorch_set_the_chunk():
    hidden, weight, _ = factors()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    with_options = ours(hidden, weight, targets("ids"), options=options)
    assert same_bits(with_options, ours(hidden, weight, targets("ids"), chunk_tokens=4))


@on_each_device
@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 4), (0,), (3, 0)])
def test_any_leading_dimensions(leading):
    hidden, weight = seeded(*leading, FEATURES).requires_grad_(), seeded(CLASSES, FEATURES, seed=1).requires_grad_()
    target = seeded_ids(CLASSES, *leading)
    loss = ours(hidden, weight, target, reduction="none")
    flat = reference(hidden.reshape(-1, FEATURES), weight, None, target.reshape(-1), reduction="none").reshape(leading)
    assert loss.shape == leading
    assert_same_gradients(loss, flat, (hidden, weight))
    stats = fastloss.torch.linear_logit_stats(hidden, weight, target, want=("logprob", "argmax"))
    assert stats.logprob.shape == stats.argmax.shape == leading


@on_each_device
def test_target_probabilities_get_their_gradient():
    hidden, weight, bias = factors()
    target = targets("soft").requires_grad_()
    for reduction in REDUCTIONS:
        loss = ours(hidden, weight, target, linear_bias=bias, reduction=reduction, chunk_tokens=4)
        expected = reference(hidden, weight, bias, target, reduction=reduction)
        assert_same_gradients(loss, expected, (hidden, weight, bias, target))


@on_each_device
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_target_ignored(reduction):
    hidden, weight, bias = factors()
    target = torch.full((TOKENS,), -100)
    loss = ours(hidden, weight, target, linear_bias=bias, reduction=reduction)
    expected = reference(hidden, weight, bias, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for grad in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@on_each_device
def test_a_denominator_keeps_an_ignored_batch_at_zero_and_on_the_graph():
    hidden, weight, _ = factors()
    for denominator in (8.0, torch.tensor(8.0)):
        loss = ours(hidden, weight, torch.full((TOKENS,), -100), denominator=denominator)
        assert loss.item() == 0.0
        assert torch.equal(torch.autograd.grad(loss, weight)[0], torch.zeros_like(weight))
        counted = ours(hidden, weight, targets("ids"), denominator=denominator)
        torch.testing.assert_close(counted, ours(hidden, weight, targets("ids"), reduction="sum") / 8)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_sixteen_bit_gradients_are_as_good_as_those_of_pytorch(dtype, chunk_tokens):
    hidden, weight, bias = factors(dtype, 96, 700, 48)
    target = targets("ids", 96, 700)
    exact = [factor.detach().double().requires_grad_() for factor in (hidden, weight, bias)]
    truth = torch.autograd.grad(reference(*exact, target), exact)
    mine = torch.autograd.grad(
        ours(hidden, weight, target, linear_bias=bias, chunk_tokens=chunk_tokens), (hidden, weight, bias)
    )
    logits = F.linear(hidden, weight, bias)
    theirs = torch.autograd.grad(F.cross_entropy(logits.float(), target), (hidden, weight, bias))
    for one, other, true in zip(mine, theirs, truth, strict=True):
        error, their_error = ((x.double() - true).norm() / true.norm() for x in (one, other))
        assert error <= 1.1 * their_error + 2.0**-12


# ---- module and statistics ----


@needs_that_of_pytorch
@on_each_device
def test_module_has_the_state_of_that_of_pytorch():
    options = here({"bias": True, "weight": CLASS_WEIGHT, "dtype": torch.float64})
    theirs = torch.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
    mine = fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
    mine.load_state_dict(theirs.state_dict())
    hidden, target = factors()[0], targets("ignored")
    torch.testing.assert_close(mine(hidden, target), theirs(hidden, target), **FLOAT64)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert "backward='exact'" in repr(mine)


@needs_that_of_pytorch
@on_each_device
def test_module_has_the_attributes_of_that_of_pytorch_and_shows_its_sizes():
    options = {"label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum", "out_features": (2,)}
    mine, theirs = (
        module(FEATURES, CLASSES, weight=CLASS_WEIGHT, **options)
        for module in (fastloss.torch.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss)
    )
    for name in ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "options"):
        assert getattr(mine, name) == getattr(theirs, name)
    for word in ("in_features=5", "num_classes=37", "out_features=(2,)", "label_smoothing=0.1", "ignore_index=3"):
        assert word in repr(mine)
    mine.reduction = "none"
    assert mine(seeded(4, FEATURES, dtype=torch.float32), seeded_ids(CLASSES, 4, 2)).shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chunk_tokens": 0}, ValueError, ["chunk_tokens", "0"]),
        ({"weight": torch.rand(CLASSES + 1)}, ValueError, ["weight", "(38,)", "(37,)"]),
        ({"logit_bias": torch.rand(1)}, ValueError, ["logit_bias", "(1,)", "(37,)"]),
        ({"options": "fast"}, TypeError, ["options", "str", "LinearCrossEntropyOptions"]),
        ({"ignore_index": "x"}, TypeError, ["ignore_index", "str"]),
        ({"backward": "fast"}, ValueError, ["backward", "fast"]),
        ({"weight": [1.0] * CLASSES}, TypeError, ["weight", "tensor", "list"]),
        ({"logit_bias": 3.0}, TypeError, ["logit_bias", "tensor", "float"]),
        ({"out_features": 3}, ValueError, ["out_features", "3"]),
        ({"out_features": (2, 0)}, ValueError, ["out_features", "(2, 0)"]),
        ({"num_classes": -1}, ValueError, ["num_classes", "-1"]),
        ({"in_features": 0}, ValueError, ["in_features", "0"]),
    ],
)
def test_bad_options_of_the_module_raise_when_it_is_made(options, error, words):
    with pytest.raises(error) as raised:
        fastloss.torch.LinearCrossEntropyLoss(**{"in_features": FEATURES, "num_classes": CLASSES} | options)
    for word in words:
        assert word in str(raised.value)


@needs_that_of_pytorch
def test_module_with_places():
    theirs = torch.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, out_features=(2, 3), bias=True, dtype=torch.float64)
    mine = fastloss.torch.LinearCrossEntropyLoss(FEATURES, CLASSES, out_features=(2, 3), bias=True, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict())
    hidden, target = factors()[0], seeded_ids(CLASSES, TOKENS, 2, 3)
    torch.testing.assert_close(mine(hidden, target), theirs(hidden, target), **FLOAT64)


@on_each_device
@pytest.mark.parametrize("many", [False, True], ids=["one id", "three ids"])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_statistics_are_those_of_the_logits(many, chunk_tokens):
    hidden, weight, bias = factors()
    target = seeded_ids(CLASSES, TOKENS, 3) if many else targets("ids")
    transform = {"softcap": 3.0, "temperature": 0.7}
    got = fastloss.torch.linear_logit_stats(
        hidden, weight, target, bias=bias, want=(*STATISTICS, "argmax", "rank"), chunk_tokens=chunk_tokens, **transform
    )
    logits = F.linear(hidden, weight, bias)
    expected = fastloss.torch.logit_stats(logits, target, want=(*STATISTICS, "argmax", "rank"), **transform)
    assert torch.equal(got.argmax, expected.argmax)
    assert torch.equal(got.rank, expected.rank)
    for name in STATISTICS:
        assert_same_gradients(getattr(got, name).sum(), getattr(expected, name).sum(), (hidden, weight, bias))


@on_each_device
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_compiled_it_takes_factors_that_are_transposed(which):
    hidden, weight, _ = factors()
    target = targets("ids")

    def loss(hidden, weight):
        return ours(hidden.t() if which == "hidden" else hidden, weight.t() if which == "weight" else weight, target)

    variables = [
        x.detach().t().contiguous() if name == which else x.detach() for name, x in (("hidden", hidden), ("weight", weight))
    ]
    for x in variables:
        x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True)
    pairs = [torch.autograd.grad(f(*variables), variables) for f in (compiled, loss)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)


def test_loss_scale_beyond_float16_reaches_its_gradients():
    hidden, weight = (seeded(n, FEATURES, scale=0.1, dtype=torch.float16) for n in (TOKENS, CLASSES))
    target = targets("ids")
    grads = torch.func.grad(lambda h, w: ours(h, w, target, denominator=1e6) * 2.0**17, argnums=(0, 1))(hidden, weight)
    expected = torch.func.grad(lambda h, w: reference(h, w, None, target, denominator=1e6) * 2.0**17, argnums=(0, 1))(
        hidden.double(), weight.double()
    )
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=5e-3, atol=float(other.abs().max()) * 2e-3)


@on_each_device
def test_statistics_differentiate_twice_and_compile():
    hidden, weight, bias = (f.detach()[:6].clone().requires_grad_() for f in factors())
    target = targets("ids", 6, 6)

    def stats(hidden, weight, bias):
        found = fastloss.torch.linear_logit_stats(hidden, weight, target, bias=bias, want=STATISTICS)
        return tuple(getattr(found, name) for name in STATISTICS)

    assert torch.autograd.gradcheck(stats, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(stats, (hidden, weight, bias))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *f: sum(s.sum() for s in stats(*f)), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias))
    expected = torch.autograd.grad(sum(s.sum() for s in stats(hidden, weight, bias)), (hidden, weight, bias))
    torch.testing.assert_close(got, expected, **FLOAT64)
    torch._dynamo.reset()


@on_each_device
def test_confident_tokens_keep_their_gradient():
    weight = torch.eye(4, dtype=torch.float32).requires_grad_()
    hidden = torch.tensor([[14.0, 0.0, 0.0, 0.0]], requires_grad=True)
    ours(hidden, weight, torch.tensor([0])).backward()
    p = torch.softmax(hidden.detach().double()[0], 0)
    expected = p - torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(hidden.grad[0].double(), expected, rtol=1e-5, atol=0)
