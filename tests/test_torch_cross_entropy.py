# SPDX-License-Identifier: Apache-2.0
"""`fastloss.torch.cross_entropy` over `torch.nn.functional.cross_entropy`: every call, its value and its gradients.

PyTorch computes in float64 here: its float64 results are the comparison, never those of a smaller type.
"""

import copy
import inspect
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

import fastloss.torch  # noqa: E402
from helpers import assert_cross_entropy_contract  # noqa: E402
from torch_helpers import (  # noqa: E402
    array,
    class_dim,
    ids_of,
    np_rows,
    oracle_options,
    run,
    same_bits,
    seeded,
    seeded_ids,
    seeded_probabilities,
)

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 4), (2, 5, 1, 2, 3), (1, 1), (3, 1, 2)]
FLOAT64 = {"rtol": 1e-12, "atol": 1e-14}
FLOAT32 = {"rtol": 2.0**-20, "atol": 2.0**-22}  # PyTorch rounds to float32 here; the exact bounds are in test_accuracy


def assert_like_pytorch(logits, target, *args, upstream=None, tolerance=FLOAT64, **kwargs):
    ours = run(fastloss.torch.cross_entropy, logits, target, *args, upstream=upstream, **kwargs)
    theirs = run(F.cross_entropy, logits, target, *args, upstream=upstream, **kwargs)
    for name, one, other in zip(("loss", "gradient", "gradient by the target"), ours, theirs, strict=True):
        if other is None:
            assert one is None
        else:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


# ---- every call of F.cross_entropy ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_class_ids_are_those_of_pytorch(smoothing, weighted, reduction, shape):
    logits, target = seeded(*shape), ids_of(shape)
    weight = seeded(shape[class_dim(shape)], seed=3).abs() + 0.1 if weighted else None
    assert_like_pytorch(logits, target, weight=weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_probabilities_and_their_gradients_are_those_of_pytorch(smoothing, weighted, reduction, shape):
    logits, target = seeded(*shape), seeded_probabilities(*shape, dim=class_dim(shape))
    weight = seeded(shape[class_dim(shape)], seed=3).abs() + 0.1 if weighted else None
    assert_like_pytorch(logits, target, weight=weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_float32_is_that_of_pytorch(soft, shape):
    logits = seeded(*shape, dtype=torch.float32)
    target = seeded_probabilities(*shape, dim=class_dim(shape)).float() if soft else ids_of(shape)
    assert_like_pytorch(logits, target, tolerance=FLOAT32)


# pytorch #63004, #104776: a class id as ignore_index was still counted.
@pytest.mark.parametrize("ignore_index", [0, 2, 4, -1, 7, 10**6])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_ignore_index_is_that_of_pytorch(weighted, smoothing, reduction, ignore_index):
    target = seeded_ids(5, 20)
    target[[3, 8]] = ignore_index
    weight = seeded(5, seed=3).abs() + 0.1 if weighted else None
    assert_like_pytorch(
        seeded(20, 5), target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
    )


def test_a_number_may_be_a_tensor_whose_value_is_read_at_each_call():
    logits, target = seeded(4, 5), ids_of((4, 5), ignored=False)
    for name, values in {"label_smoothing": (0.125, 0.5), "ignore_index": (int(target[0]), int(target[1]))}.items():
        number = torch.tensor(values[0])
        for value in values:
            number.fill_(value)
            expected = F.cross_entropy(logits, target, **{name: number})
            torch.testing.assert_close(fastloss.torch.cross_entropy(logits, target, **{name: number}), expected, **FLOAT64)
        module = fastloss.torch.CrossEntropyLoss(**{name: number})
        torch.testing.assert_close(module(logits, target), expected, **FLOAT64)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3])
def test_probabilities_with_an_ignored_id_are_refused_where_pytorch_refuses_them(ignore_index):
    logits, target = seeded(4, 5), seeded_probabilities(4, 5)
    if ignore_index < 0:
        assert_like_pytorch(logits, target, ignore_index=ignore_index)
        return
    for function, error in ((F.cross_entropy, RuntimeError), (fastloss.torch.cross_entropy, ValueError)):
        with pytest.raises(error, match="ignore_index"):
            function(logits, target, ignore_index=ignore_index)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments_are_those_of_pytorch(reduce, size_average):
    if size_average is None and reduce is None:
        assert_like_pytorch(seeded(4, 5), ids_of((4, 5)), size_average=None, reduce=None)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_like_pytorch(seeded(4, 5), ids_of((4, 5)), size_average=size_average, reduce=reduce)


def test_every_argument_may_be_given_by_position():
    weight = seeded(5, seed=3).abs() + 0.1
    assert_like_pytorch(seeded(4, 5), ids_of((4, 5), ignored=False), weight, None, 2, None, "sum", 0.1)


def test_signature_begins_with_that_of_pytorch():
    ours = list(inspect.signature(fastloss.torch.cross_entropy).parameters.values())
    theirs = list(inspect.signature(F.cross_entropy).parameters.values())
    for one, other in zip(ours, theirs, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert [p.name for p in ours[len(theirs) :]] == [
        "dim",
        "z_loss",
        "softcap",
        "temperature",
        "logit_bias",
        "denominator",
        "inplace",
    ]


def test_assigned_over_pytorchs_function_a_model_trains_the_same(monkeypatch):
    def train():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        x, y = seeded(32, 4), seeded_ids(6, 32)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().view(-1) for p in model.parameters()])

    theirs = train()
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return fastloss.torch.cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", counted)
    torch.testing.assert_close(train(), theirs, rtol=1e-11, atol=1e-13)
    assert len(calls) == 10


# All labels ignored: NaN (PyTorch), 0 (Liger), a crash in backward (CCE, torchtune).
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_labels_ignored_is_that_of_pytorch(smoothing, reduction):
    logits, target = seeded(4, 5), torch.full((4,), -100)
    ours = run(fastloss.torch.cross_entropy, logits, target, reduction=reduction, label_smoothing=smoothing)
    theirs = run(F.cross_entropy, logits, target, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=0, atol=0)
    assert torch.all(ours[1] == 0)


def test_all_labels_ignored_with_a_denominator_is_zero_and_on_the_graph():
    logits = seeded(4, 5).requires_grad_()
    loss = fastloss.torch.cross_entropy(logits, torch.full((4,), -100), denominator=3.0)
    assert loss.item() == 0
    loss.backward()
    assert torch.all(logits.grad == 0)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_empty_batch_is_that_of_pytorch(soft, reduction, shape):
    target = torch.zeros(shape, dtype=torch.float64) if soft else torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    assert_like_pytorch(seeded(*shape), target, reduction=reduction)


def test_minus_inf_logits_are_those_of_pytorch():
    logits = seeded(4, 9)
    logits[0, :5] = -torch.inf
    logits[1, 3:] = -torch.inf
    logits[2, 4] = -torch.inf
    assert_like_pytorch(logits, torch.tensor([8, 1, 0, 3]), reduction="none")


# ---- module ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_module_is_that_of_pytorch(reduction):
    weight = seeded(5, seed=3).abs() + 0.1
    ours = fastloss.torch.CrossEntropyLoss(weight, ignore_index=2, reduction=reduction, label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=2, reduction=reduction, label_smoothing=0.1)
    logits, target = seeded(8, 5), seeded_ids(5, 8)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target), **FLOAT64)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_module_takes_every_extra_of_the_function():
    extras = {"dim": -1, "z_loss": 0.1, "softcap": 2.0, "temperature": 0.5}
    logits, target, bias = seeded(3, 4, 5), seeded_ids(5, 3, 4), seeded(5, seed=9)
    module = fastloss.torch.CrossEntropyLoss(**extras, logit_bias=bias)
    assert same_bits(module(logits, target), fastloss.torch.cross_entropy(logits, target, **extras, logit_bias=bias))


def test_module_can_be_copied_printed_and_loaded():
    module = fastloss.torch.CrossEntropyLoss(torch.ones(5), label_smoothing=0.1, z_loss=0.2)
    logits, target = seeded(4, 5, dtype=torch.float32), seeded_ids(5, 4)
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert same_bits(twin(logits, target), module(logits, target))
    assert "CrossEntropyLoss" in repr(module)


# ---- extras ----

EXTRAS = {
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "logit_bias": {"logit_bias": True},
    "everything": {"z_loss": 1e-2, "softcap": 3.0, "temperature": 0.6, "logit_bias": True, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_extras_are_those_of_the_oracle(reduction, soft, dtype, name):
    dtype = getattr(torch, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logits = seeded(6, 300, dtype=dtype)
    target = seeded_probabilities(6, 300).to(acc) if soft else seeded_ids(300, 6)
    options = dict(EXTRAS[name])
    if "logit_bias" in options:
        options["logit_bias"] = seeded(300, seed=5, scale=1.0, dtype=acc)
    loss, gradient, _ = run(fastloss.torch.cross_entropy, logits, target, reduction=reduction, **options)
    assert_cross_entropy_contract(
        array(loss), array(gradient), array(logits), array(target), oracle_options(**options), reduction
    )


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_dim_is_the_class_dimension(soft, dim):
    logits = seeded(4, 5, 6, dtype=torch.float32)
    ids = seeded_ids(logits.shape[dim], *logits.movedim(dim, -1).shape[:-1])
    target = seeded_probabilities(4, 5, 6, dim=dim).float() if soft else ids
    loss, gradient, _ = run(fastloss.torch.cross_entropy, logits, target, dim=dim)
    flat_target = np_rows(target, dim) if soft else array(target).ravel()
    assert_cross_entropy_contract(array(loss), np_rows(gradient, dim), np_rows(logits, dim), flat_target)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_denominator_divides_loss_and_gradient(as_tensor):
    logits, target = seeded(6, 50, dtype=torch.float32), seeded_ids(50, 6)
    denominator = torch.tensor(17.0) if as_tensor else 17.0
    loss, gradient, _ = run(fastloss.torch.cross_entropy, logits, target, denominator=denominator)
    assert_cross_entropy_contract(array(loss), array(gradient), array(logits), array(target), denominator=17.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_denominator_may_be_a_count_of_any_type(dtype):
    logits, target = seeded(6, 50), seeded_ids(50, 6)
    expected = fastloss.torch.cross_entropy(logits, target, denominator=4)
    actual = fastloss.torch.cross_entropy(logits, target, denominator=torch.tensor(4, dtype=dtype))
    torch.testing.assert_close(actual, expected, **FLOAT64)


def test_denominator_of_a_window_makes_accumulated_gradients_those_of_the_whole():
    logits, target = seeded(8, 50), seeded_ids(50, 8)
    target[[1, 2, 6]] = -100
    whole = run(F.cross_entropy, logits, target)[1]
    window = (target != -100).sum()
    parts = [
        run(fastloss.torch.cross_entropy, logits[i : i + 2], target[i : i + 2], denominator=window)[1] for i in (0, 2, 4, 6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **FLOAT64)


# ---- upstream gradients ----


# Liger #968, #1298; TransformerEngine #2139: wrong gradients for any upstream gradient that is not 1.
@pytest.mark.parametrize("upstream", [0.0, -1.0, 0.5, 3.0, 1e-3, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_upstream_gradient_multiplies_the_gradient(soft, inplace, reduction, upstream):
    logits = seeded(6, 50)
    target = seeded_probabilities(6, 50) if soft else seeded_ids(50, 6)
    theirs = run(F.cross_entropy, logits, target, reduction=reduction, upstream=torch.tensor(upstream, dtype=torch.float64))
    leaf = logits.clone().requires_grad_()
    soft_leaf = target.clone().requires_grad_(soft)
    loss = fastloss.torch.cross_entropy(leaf * 1, soft_leaf, reduction=reduction, inplace=inplace)
    (loss * upstream).backward()
    torch.testing.assert_close(leaf.grad, theirs[1], **FLOAT64)
    if soft:
        torch.testing.assert_close(soft_leaf.grad, theirs[2], **FLOAT64)


@pytest.mark.parametrize("layout", ["contiguous", "reversed", "expanded", "every second", "transposed"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_upstream_of_each_row_multiplies_its_gradient(soft, layout):
    logits = seeded(4, 7, 4)
    target = seeded_probabilities(4, 7, 4) if soft else ids_of((4, 7, 4))
    upstream = {
        "contiguous": seeded(4, 4),
        "reversed": seeded(4, 4).flip(0),
        "expanded": seeded(4, 1).expand(4, 4),
        "every second": seeded(4, 8)[:, ::2],
        "transposed": seeded(4, 4).T,
    }[layout]
    assert_like_pytorch(logits, target, reduction="none", upstream=upstream)


def test_upstream_of_a_later_operation_is_applied():
    logits, target = seeded(6, 50), seeded_ids(50, 6)

    def focal(function):
        leaf = logits.clone().requires_grad_()
        row = function(leaf, target, reduction="none")
        ((1 - torch.exp(-row)) ** 2 * row).sum().backward()
        return leaf.grad

    torch.testing.assert_close(focal(fastloss.torch.cross_entropy), focal(F.cross_entropy), **FLOAT64)
