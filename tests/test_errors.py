# SPDX-License-Identifier: Apache-2.0
"""Bad input: one table of what goes in, which exception comes out, and which words its message must contain.

The message names the argument, the value or shape met, and what was expected. Nothing is written when a call raises.
"""

import warnings

import numpy as np
import pytest

import binding
import fastloss
from helpers import DTYPES
from reference import Options

try:
    import torch
except ImportError:
    torch = None
else:
    import fastloss.torch

needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch")

X = np.zeros((4, 5), np.float32)
Y = np.array([0, 1, 2, 3])
Q = np.full((4, 5), 0.2, np.float32)

# What both APIs must refuse: arguments by their NumPy names, exception, words of the message.
LOSS = {
    # target ids
    "id beyond the classes": ({"target": [0, 1, 5, 3]}, IndexError, ["target[2]", "5", "out of range", "5 classes"]),
    "negative id": ({"target": [0, -1, 2, 3]}, IndexError, ["target[1]", "-1", "out of range", "5 classes"]),
    "default ignore_index with another": (
        {"target": [0, -100, 2, 3], "ignore_index": 2},
        IndexError,
        ["target[1]", "-100", "out of range"],
    ),
    "huge id": ({"target": [0, 1, 2, 2**40]}, IndexError, ["target[3]", str(2**40), "out of range"]),
    "unsigned id beyond int64": (
        {"target": np.array([0, 1, 2**64 - 100, 3], np.uint64)},
        IndexError,
        ["target", str(2**64 - 100), "out of range"],
    ),
    "id at a place of two dimensions": (
        {"logits": np.zeros((2, 10, 3), np.float32), "target": [[0, 1, 2], [0, 99, 1]]},
        IndexError,
        ["target[1, 1] = 99 is out of range for 10 classes"],
    ),
    "id of a single row": ({"logits": X[0], "target": 5}, IndexError, ["target = 5 is out of range for 5 classes"]),
    "too few ids": ({"target": [0, 1, 2]}, ValueError, ["target", "(3,)", "(4,)"]),
    "ids with an extra axis": ({"target": [[0], [1], [2], [3]]}, ValueError, ["target", "(4, 1)", "(4,)"]),
    "one id for a batch": ({"target": 1}, ValueError, ["target", "()", "(4,)"]),
    "ids of logits with the classes last": (
        {"logits": np.zeros((2, 3, 5), np.float32), "target": [[0, 1, 2], [0, 1, 2]]},
        ValueError,
        ["target", "(2, 3)", "(2, 5)", "=-1 for classes last"],
    ),
    # soft targets
    "probabilities of the wrong shape": ({"target": Q[:, :4]}, ValueError, ["target", "(4, 4)", "(4, 5)"]),
    "floating-point ids": ({"target": Y.astype(np.float32)}, ValueError, ["target", "(4,)", "(4, 5)"]),
    "transposed probabilities": ({"target": Q.T}, ValueError, ["target", "(5, 4)", "(4, 5)"]),
    "probabilities with an ignored id": (
        {"target": Q, "ignore_index": 3},
        ValueError,
        ["ignore_index", "3", "probabilities"],
    ),
    "boolean target": ({"target": Y > 1}, TypeError, ["target", "bool"]),
    "complex target": ({"target": Q.astype(np.complex64)}, TypeError, ["target", "complex64"]),
    # logits
    "integer logits": ({"logits": X.astype(np.int64)}, TypeError, ["int64", "float32"]),
    "boolean logits": ({"logits": X > 0}, TypeError, ["bool", "float32"]),
    "complex logits": ({"logits": X.astype(np.complex64)}, TypeError, ["complex64", "float32"]),
    "no class axis": ({"logits": np.float32(1), "target": 0}, ValueError, ["0"]),
    "no classes": ({"logits": X[:, :0], "target": Y}, ValueError, ["(4, 0)", "class"]),
    # weight and bias
    "short weight": ({"weight": np.ones(4, np.float32)}, ValueError, ["weight", "(4,)", "(5,)"]),
    "weight of two axes": ({"weight": np.ones((1, 5), np.float32)}, ValueError, ["weight", "(1, 5)", "(5,)"]),
    "complex weight": ({"weight": np.ones(5, np.complex64)}, TypeError, ["weight", "complex64"]),
    "long bias": ({"bias": np.ones(6, np.float32)}, ValueError, ["bias", "(6,)", "(5,)"]),
    "complex bias": ({"bias": np.ones(5, np.complex64)}, TypeError, ["bias", "complex64"]),
    # options
    "unknown reduction": ({"reduction": "average"}, ValueError, ["reduction", "average", "none", "mean", "sum"]),
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "[0, 1]"]),
    "smoothing above 1": ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5", "[0, 1]"]),
    "smoothing of NaN": ({"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "nan"]),
    "smoothing of text": ({"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "str"]),
    "z_loss beyond all floats": ({"z_loss": 10**400}, ValueError, ["z_loss", "finite"]),
    "temperature beyond all floats": ({"temperature": 10**400}, ValueError, ["temperature", "finite"]),
    "temperature whose reciprocal float32 cannot hold": (
        {"temperature": 1e-39},
        ValueError,
        ["temperature", "1e-39", "1.2e-38", "8.5e+37", "float32"],
    ),
    "softcap that float32 cannot hold": ({"softcap": 1e39}, ValueError, ["softcap", "1e+39", "8.5e+37", "float32"]),
    "temperature and softcap too small together": (
        {"temperature": 1e-30, "softcap": 1e-30},
        ValueError,
        ["temperature * softcap", "1e-60", "float32"],
    ),
    "negative z_loss": ({"z_loss": -1e-4}, ValueError, ["z_loss", "-0.0001"]),
    "infinite z_loss": ({"z_loss": float("inf")}, ValueError, ["z_loss", "inf"]),
    "temperature of zero": ({"temperature": 0.0}, ValueError, ["temperature", "0.0", "positive"]),
    "negative temperature": ({"temperature": -2.0}, ValueError, ["temperature", "-2.0", "positive"]),
    "temperature of NaN": ({"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
    "softcap of zero": ({"softcap": 0.0}, ValueError, ["softcap", "0.0", "positive"]),
    "negative softcap": ({"softcap": -30.0}, ValueError, ["softcap", "-30.0", "positive"]),
    "ignore_index of bool": ({"ignore_index": True}, TypeError, ["ignore_index", "bool"]),
    "class axis of bool": ({"axis": True}, TypeError, ["integer", "bool"]),
    "ignore_index of float": ({"ignore_index": 1.5}, TypeError, ["ignore_index", "float"]),
    "denominator with sum": ({"denominator": 3.0, "reduction": "sum"}, ValueError, ["denominator", "mean", "sum"]),
    "denominator with none": ({"denominator": 3.0, "reduction": "none"}, ValueError, ["denominator", "mean", "none"]),
    "denominator of zero": ({"denominator": 0.0}, ValueError, ["denominator", "0.0", "positive"]),
    "denominator of text": ({"denominator": "3"}, TypeError, ["denominator", "str"]),
}

STATS = {
    "unknown statistic": ({"want": ("entropy", "perplexity")}, ValueError, ["perplexity", "logsumexp", "entropy"]),
    "log-prob without a target": ({"want": ("logprob",), "target": None}, ValueError, ["logprob", "target"]),
    "rank without a target": ({"want": ("rank",), "target": None}, ValueError, ["rank", "target"]),
    "id beyond the classes": ({"target": [0, 1, 5, 3]}, IndexError, ["target[2]", "5", "out of range", "5 classes"]),
    "ignored id": ({"target": [0, -100, 2, 3]}, IndexError, ["target[1]", "-100", "out of range"]),
    "one id of several": ({"target": [[0, 1], [1, 9], [0, 0], [0, 0]]}, IndexError, ["target[1, 1] = 9", "out of range"]),
    "unsigned id beyond int64": ({"target": np.array([0, 1, 2, 2**63], np.uint64)}, IndexError, ["target", str(2**63)]),
    "softcap that float32 cannot hold": ({"softcap": 1e39}, ValueError, ["softcap", "1e+39", "8.5e+37", "float32"]),
    "too few ids": ({"target": [0, 1, 2]}, ValueError, ["target", "(3,)", "(4,)"]),
    "floating-point target": ({"target": Q}, TypeError, ["target", "float32"]),
    "integer logits": ({"logits": X.astype(np.int32)}, TypeError, ["int32", "float32"]),
    "no classes": ({"logits": X[:, :0]}, ValueError, ["(4, 0)", "class"]),
    "negative temperature": ({"temperature": -1.0}, ValueError, ["temperature", "-1.0", "positive"]),
    "negative softcap": ({"softcap": -1.0}, ValueError, ["softcap", "-1.0", "positive"]),
    "short bias": ({"bias": np.ones(4, np.float32)}, ValueError, ["bias", "(4,)", "(5,)"]),
}

# What only NumPy can be given.
NUMPY = {
    "object logits": ({"logits": X.astype(object)}, TypeError, ["logits", "object", "float32"]),
    "logits of text": ({"logits": np.array([["a", "b"]]), "target": [0]}, TypeError, ["logits", "<U1", "float32"]),
    "dates as logits": ({"logits": X.astype("datetime64[s]")}, TypeError, ["logits", "datetime64", "float32"]),
    "long double logits": ({"logits": X.astype(np.longdouble)}, TypeError, ["logits", "float32"]),
    "object target": ({"target": Y.astype(object)}, TypeError, ["target", "object"]),
    "masked logits": ({"logits": np.ma.ones((4, 5))}, TypeError, ["logits", "mask"]),
    "masked target": ({"target": np.ma.array([0, 1, 2, 3], mask=[1, 0, 0, 0])}, TypeError, ["target", "mask"]),
    "masked weight": ({"weight": np.ma.ones(5)}, TypeError, ["weight", "mask"]),
    "ragged logits": ({"logits": [[0.0], [0.0, 1.0]]}, TypeError, ["logits", "array", "list"]),
    "axis beyond the last": ({"axis": 2}, IndexError, ["axis", "2"]),
    "axis before the first": ({"axis": -3}, IndexError, ["axis", "-3"]),
    "axis of float": ({"axis": 1.0}, TypeError, ["axis", "float"]),
    "reduction of None": ({"reduction": None}, TypeError, ["reduction", "NoneType"]),
    "a word for return_grad": ({"return_grad": "no"}, TypeError, ["return_grad", "True or False", "'no'"]),
}


def check(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("case", [*LOSS, *NUMPY])
@pytest.mark.parametrize("return_grad", [False, True], ids=["", "grad"])
def test_cross_entropy_raises(case, return_grad):
    changed, error, words = (LOSS | NUMPY)[case]
    arguments = {"logits": X, "target": Y, "return_grad": return_grad} | changed
    check(lambda: fastloss.cross_entropy(**arguments), error, words)


@pytest.mark.parametrize("case", STATS)
def test_logit_stats_raises(case):
    changed, error, words = STATS[case]
    arguments = {"logits": X, "target": Y, "want": ("logprob",)} | changed
    check(lambda: fastloss.logit_stats(**arguments), error, words)


# ---- PyTorch ----

# torch calls some things by other names.
CROSS_ENTROPY_NAMES = {"logits": "input", "bias": "logit_bias", "axis": "dim"}
STATS_NAMES = {"axis": "dim"}


def as_torch(name, value):
    if name in ("logits", "target", "weight", "bias") and value is not None:
        return torch.as_tensor(np.asarray(value))
    return value


def torch_arguments(changed, names=CROSS_ENTROPY_NAMES):
    arguments = {"logits": X, "target": Y} | changed
    return {names.get(name, name): as_torch(name, value) for name, value in arguments.items()}


@needs_torch
@pytest.mark.parametrize("name", ["logits", "target", "weight"])
def test_tensors_that_are_no_arrays_raise_by_name(name):
    for tensor in (torch.zeros(5, dtype=torch.bfloat16), torch.zeros(5, requires_grad=True)):
        arguments = {"logits": X, "target": Y, name: tensor}
        check(lambda: fastloss.cross_entropy(**arguments), TypeError, [name, "array", "Tensor"])  # noqa: B023


@needs_torch
@pytest.mark.parametrize("case", LOSS)
def test_torch_cross_entropy_raises(case):
    changed, error, words = LOSS[case]
    arguments = torch_arguments(changed)
    check(lambda: fastloss.torch.cross_entropy(**arguments), error, words)


@needs_torch
@pytest.mark.parametrize("case", LOSS)
def test_torch_cross_entropy_raises_with_gradients_wanted(case):
    changed, error, words = LOSS[case]
    arguments = torch_arguments(changed)
    if not arguments["input"].is_floating_point():
        pytest.skip("these logits can have no gradient")
    arguments["input"] = arguments["input"].clone().requires_grad_()
    check(lambda: fastloss.torch.cross_entropy(**arguments).sum().backward(), error, words)


@needs_torch
@pytest.mark.parametrize("case", STATS)
def test_torch_logit_stats_raises(case):
    changed, error, words = STATS[case]
    arguments = torch_arguments({"want": ("logprob",)} | changed, STATS_NAMES)
    check(lambda: fastloss.torch.logit_stats(**arguments), error, words)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch means to drop them
        return torch.quantize_per_tensor(torch.zeros(4, 5), 0.1, 0, torch.qint8)


def on_xpu(*tensors):
    """Tensors that say they are there, on machines without it too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return [torch.empty(t.shape, dtype=t.dtype, device="xpu") for t in tensors]


def torch_only():
    """Name: (call, exception, words)."""
    x, y = torch.zeros(4, 5), torch.arange(4)
    cross_entropy = fastloss.torch.cross_entropy
    leaf = torch.zeros(4, 5, requires_grad=True)
    return {
        "sparse logits": (lambda: cross_entropy(x.to_sparse(), y), TypeError, ["sparse", "dense"]),
        "logits on another device": (lambda: cross_entropy(*on_xpu(x, y)), NotImplementedError, ["xpu", "CPU", "CUDA"]),
        "target on another device": (
            lambda: cross_entropy(x, y.to("meta")),
            (TypeError, ValueError),
            ["target", "meta", "cpu"],
        ),
        "weight on another device": (
            lambda: cross_entropy(x, y, torch.ones(5, device="meta")),
            (TypeError, ValueError),
            ["weight", "meta", "cpu"],
        ),
        "inplace on a leaf": (lambda: cross_entropy(leaf, y, inplace=True), (ValueError, RuntimeError), ["inplace", "leaf"]),
        "array for a tensor": (lambda: cross_entropy(X, y), TypeError, ["input", "ndarray", "tensor"]),
        "array for the target": (lambda: cross_entropy(x, Y), TypeError, ["target", "ndarray", "tensor"]),
        "dim beyond the last": (lambda: cross_entropy(x, y, dim=2), IndexError, ["dim", "2"]),
        "float8 logits": (lambda: cross_entropy(x.to(torch.float8_e4m3fn), y), TypeError, ["float8_e4m3fn", "float32"]),
        "denominator of two numbers": (
            lambda: cross_entropy(x, y, denominator=torch.ones(2)),
            ValueError,
            ["denominator", "(2,)"],
        ),
        "index out of range": (
            lambda: fastloss.torch.selective_log_softmax(x, torch.full((4,), 7)),
            IndexError,
            ["index[0] = 7 is out of range for 5 classes"],
        ),
        "index of bool": (lambda: fastloss.torch.selective_log_softmax(x, y > 1), TypeError, ["index", "bool", "integer"]),
        "index of logits without classes": (
            lambda: fastloss.torch.selective_log_softmax(x[0, 0], y[0]),
            ValueError,
            ["logits", "class axis", "0-dimensional"],
        ),
        "sparse weight": (lambda: cross_entropy(x, y, torch.ones(5).to_sparse()), TypeError, ["weight", "dense", "sparse"]),
        "module with a dim of text": (lambda: fastloss.torch.CrossEntropyLoss(dim="x"), TypeError, ["dim", "str"]),
        "smoothing that needs a gradient": (
            lambda: cross_entropy(x, y, label_smoothing=torch.tensor(0.1, requires_grad=True)),
            TypeError,
            ["label_smoothing", "Tensor", "requires a gradient"],
        ),
        "smoothing of one dimension": (
            lambda: cross_entropy(x, y, label_smoothing=torch.tensor([0.1])),
            TypeError,
            ["label_smoothing", "Tensor"],
        ),
        "quantised logits": (lambda: cross_entropy(quantised(), y), TypeError, ["qint8", "float32"]),
    }


@needs_torch
@pytest.mark.parametrize("case", sorted(torch_only()) if torch is not None else [])
def test_torch_raises(case):
    call, error, words = torch_only()[case]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


DENOMINATORS = {
    "zero": (0, ValueError, ["denominator", "positive", "0"]),
    "negative": (-3.0, ValueError, ["denominator", "positive", "-3.0"]),
    "NaN": (float("nan"), ValueError, ["denominator", "finite", "nan"]),
    "infinite": (float("inf"), ValueError, ["denominator", "finite", "inf"]),
    "complex": (1 + 1j, TypeError, ["denominator", "complex64"]),
    "bool": (True, TypeError, ["denominator", "bool"]),
}


@needs_torch
@pytest.mark.parametrize("case", DENOMINATORS)
def test_denominator_of_a_tensor_raises_as_that_of_a_number(case):
    value, error, words = DENOMINATORS[case]
    x, y = torch.zeros(4, 5), torch.arange(4)
    for denominator in (torch.tensor(value), value):
        if isinstance(denominator, complex):
            words = ["denominator", "complex"]
        check(lambda d=denominator: fastloss.torch.cross_entropy(x, y, denominator=d), error, words)
        check(lambda d=denominator: fastloss.torch.linear_cross_entropy(x, x, y % 4, denominator=d), error, words)


@needs_torch
def test_denominator_on_another_device_raises():
    x, y, denominator = torch.zeros(4, 5), torch.arange(4), torch.ones((), device="meta")
    for call in (fastloss.torch.cross_entropy, lambda *a, **k: fastloss.torch.linear_cross_entropy(x, *a, **k)):
        check(lambda call=call: call(x, y, denominator=denominator), ValueError, ["denominator", "meta", "cpu"])


# ---- nothing is written when a call raises ----


# Liger linear, Apple CCE, QuACK: labels out of range read or wrote out of bounds, or gave a plausible loss.
@pytest.mark.parametrize("where", [0, 3333, 9999])
@pytest.mark.parametrize("bad", [-1, 40, 2**31, -(2**63)])
def test_target_out_of_range_anywhere_in_a_threaded_run_writes_nothing(bad, where, threads, rng):
    logits = rng.standard_normal((10000, 40)).astype(np.float32)
    target = rng.integers(40, size=10000)
    target[where] = bad
    call = binding.Call(logits, target, Options(), reduction="none")
    call.loss[...] = 123
    call.saved[...] = 123
    gradient = np.full_like(logits, 123)
    with pytest.raises(IndexError, match=rf"target\[{where}\] = {bad} is out of range for 40 classes"):
        call.forward(gradient)
    for written in (call.loss, call.saved, gradient):
        assert np.all(written == 123)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_out_of_range_leaves_the_logits_of_an_in_place_call_alone(dtype, isa, rng):
    logits = rng.standard_normal((300, 5000)).astype(DTYPES[dtype])
    before = logits.copy()
    target = rng.integers(5000, size=300)
    target[299] = 5000
    with pytest.raises(IndexError):
        binding.Call(logits, target, Options()).forward(logits)
    np.testing.assert_array_equal(logits, before)


@needs_torch
@pytest.mark.parametrize("case", LOSS)
def test_torch_inplace_call_that_raises_leaves_the_logits_alone(case):
    changed, error, _ = LOSS[case]
    if "logits" in changed:
        pytest.skip("this case has no logits to leave alone")
    leaf = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = leaf * 1
    before, version = logits.detach().clone(), logits._version
    arguments = torch_arguments(changed) | {"input": logits, "inplace": True}
    with pytest.raises(error):
        fastloss.torch.cross_entropy(**arguments).sum().backward()
    assert torch.equal(logits, before)
    assert logits._version == version


def test_out_of_range_target_of_statistics_writes_nothing(rng):
    from fastloss import _cpu

    logits = rng.standard_normal((10, 40)).astype(np.float32)
    ids = np.zeros((10, 2), np.int64)
    ids[7, 1] = 40
    out = np.full((10, 2), 123, np.float32)
    pointers = (out.ctypes.data, *(0,) * 7)
    with pytest.raises(IndexError, match=r"target\[7, 1\] = 40 is out of range for 40 classes"):
        _cpu.statistics(binding.tensor(logits, 1), (ids.ctypes.data, 8), 2, (1.0, 0.0, 0), pointers, 0)
    assert np.all(out == 123)


def test_empty_batch_is_no_error():
    assert fastloss.cross_entropy(X[:0], Y[:0], reduction="sum") == 0
