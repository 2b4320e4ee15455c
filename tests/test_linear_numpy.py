# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy and statistics of NumPy arrays against the float64 oracle on their logits; and what both APIs refuse."""

import tracemalloc

import numpy as np
import pytest

import fastloss
import reference
from helpers import DTYPES, assert_same_bits
from reference import Options

try:
    import torch
except ImportError:
    torch = None
else:
    import fastloss.torch

TOKENS, CLASSES, FEATURES = 13, 37, 5
OPTIONS = {
    "plain": Options(),
    "class weight and smoothing": Options(weight=np.linspace(0.5, 1.5, CLASSES), label_smoothing=0.2),
    "extras": Options(z_loss=0.1, softcap=3.0, temperature=0.7, bias=np.linspace(-1, 1, CLASSES)),
}


def factors(rng, dtype=np.float64, tokens=(TOKENS,)):
    shapes = ((*tokens, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def arguments(options):
    return {
        "class_weight": options.weight,
        "label_smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "softcap": options.softcap,
        "temperature": options.temperature,
        "logit_bias": options.bias,
    }


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["ids", "ignored", "soft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_the_oracle(name, kind, reduction, chunk_tokens, rng):
    hidden, weight, bias = factors(rng)
    target = rng.dirichlet(np.ones(CLASSES), TOKENS) if kind == "soft" else rng.integers(CLASSES, size=TOKENS)
    if kind == "ignored":
        target[::3] = -100
    options = OPTIONS[name]
    logits = hidden @ weight.T + bias
    loss, (dhidden, dweight, dbias) = fastloss.linear_cross_entropy(
        hidden,
        weight,
        target,
        bias=bias,
        reduction=reduction,
        return_grad=True,
        chunk_tokens=chunk_tokens,
        **arguments(options),
    )
    np.testing.assert_allclose(loss, np.float64(reference.cross_entropy(logits, target, options, reduction)), rtol=1e-12)
    dlogits = np.float64(reference.cross_entropy_gradient(logits, target, options, reduction))
    for got, expected in ((dhidden, dlogits @ weight), (dweight, dlogits.T @ hidden), (dbias, dlogits.sum(0))):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
def test_every_dtype_comes_back_and_is_rounded_once(dtype, rng):
    hidden, weight, bias = factors(rng, DTYPES[dtype])
    target = rng.integers(CLASSES, size=TOKENS)
    loss, grads = fastloss.linear_cross_entropy(hidden, weight, target, bias=bias, return_grad=True, chunk_tokens=4)
    assert loss.dtype == np.float32
    wide = [np.asarray(factor, np.float64) for factor in (hidden, weight, bias)]
    exact_loss, exact = fastloss.linear_cross_entropy(*wide[:2], target, bias=wide[2], return_grad=True)
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
    rounding = {"float32": 2.0**-20, "float16": 2.0**-10.9, "bfloat16": 2.0**-7.9}[dtype]
    for got, expected in zip(grads, exact, strict=True):
        assert got.dtype == DTYPES[dtype]
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_for_any_chunks_threads_and_isa(dtype, rng, set_threads):
    hidden, weight, bias = factors(rng, DTYPES[dtype], (131,))
    target = rng.integers(CLASSES, size=131)
    isa, results = fastloss.isa(), []
    try:
        for threads, chunk_tokens, name in ((2, None, isa), (1, 1, isa), (3, 7, "scalar"), (24, 50, isa)):
            set_threads(threads)
            fastloss._cpu.set_isa(name)
            _, grads = fastloss.linear_cross_entropy(
                hidden, weight, target, bias=bias, return_grad=True, chunk_tokens=chunk_tokens
            )
            results.append(grads)
    finally:
        fastloss._cpu.set_isa(isa)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("backward", ["loss", "sampled"])
def test_weights_of_16_bits_are_not_copied(backward, rng):
    hidden = rng.standard_normal((4, 64)).astype(np.float16)
    weight = rng.standard_normal((20_000, 64)).astype(np.float16)  # 2.4 MiB
    options = {} if backward == "loss" else {"backward": backward, "return_grad": True}
    tracemalloc.start()
    try:
        fastloss.linear_cross_entropy(hidden, weight, [0, 1, 2, 3], **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = 4 * len(weight) * 4 + (0 if backward == "loss" else weight.nbytes)  # logits, the gradient by the weights
    assert peak < allowed + weight.nbytes / 2


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_dimensions(leading, rng):
    hidden, weight, _ = factors(rng, tokens=leading)
    target = rng.integers(CLASSES, size=leading)
    loss = fastloss.linear_cross_entropy(hidden, weight, target, reduction="none")
    expected = reference.cross_entropy_rows((hidden @ weight.T).reshape(-1, CLASSES), target.reshape(-1))
    assert np.shape(loss) == leading
    np.testing.assert_allclose(np.reshape(loss, -1), np.float64(expected), rtol=1e-12)
    _, (dhidden, dweight, dbias) = fastloss.linear_cross_entropy(hidden, weight, target, reduction="sum", return_grad=True)
    assert dhidden.shape == hidden.shape
    assert dweight.shape == weight.shape
    assert dbias is None
    stats = fastloss.linear_logit_stats(hidden, weight, target, want=("logprob", "rank"))
    assert np.shape(stats.logprob) == np.shape(stats.rank) == leading


def test_every_target_ignored(rng):
    hidden, weight, bias = factors(rng)
    target = np.full(TOKENS, -100)
    for options, expected in (({}, np.nan), ({"denominator": 3.0}, 0.0), ({"reduction": "sum"}, 0.0)):
        loss, grads = fastloss.linear_cross_entropy(hidden, weight, target, bias=bias, return_grad=True, **options)
        np.testing.assert_equal(loss, expected)
        assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("many", [False, True], ids=["one id", "three ids"])
def test_statistics_are_those_of_the_logits(many, chunk_tokens, rng):
    hidden, weight, bias = factors(rng)
    target = rng.integers(CLASSES, size=(TOKENS, 3) if many else TOKENS)
    names = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")
    transform = {"softcap": 3.0, "temperature": 0.7}
    logit_bias = np.linspace(-1, 1, CLASSES)
    got = fastloss.linear_logit_stats(
        hidden, weight, target, bias=bias, want=names, logit_bias=logit_bias, chunk_tokens=chunk_tokens, **transform
    )
    expected = fastloss.logit_stats(hidden @ weight.T + bias, target, want=names, bias=logit_bias, **transform)
    for name in names:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-12)
    assert fastloss.linear_logit_stats(hidden, weight, want="entropy").logprob is None


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**63, 2**64 - 1])
def test_seeds_are_those_of_pytorch(seed, rng):
    hidden, weight, _ = factors(rng)
    target = rng.integers(CLASSES, size=TOKENS)
    options = {"backward": "sampled", "threshold": 0.1, "seed": seed}
    _, (_, got, _) = fastloss.linear_cross_entropy(hidden, weight, target, return_grad=True, **options)
    if torch is not None:
        torch.manual_seed(seed)
        matrix = torch.from_numpy(weight).requires_grad_()
        fastloss.torch.linear_cross_entropy(torch.from_numpy(hidden), matrix, torch.from_numpy(target), **options).backward()
        np.testing.assert_allclose(got, matrix.grad.numpy(), rtol=1e-12)


def test_seeds_reproduce(rng):
    hidden, weight, _ = factors(rng)
    target = rng.integers(CLASSES, size=TOKENS)

    def gradient(seed):
        return fastloss.linear_cross_entropy(
            hidden, weight, target, backward="sampled", threshold=0.1, seed=seed, return_grad=True
        )[1][1]

    np.testing.assert_array_equal(gradient(5), gradient(5))
    np.testing.assert_array_equal(gradient(np.random.default_rng(1)), gradient(np.random.default_rng(1)))
    assert not np.array_equal(gradient(None), gradient(None))


# ---- bad input: arguments by their NumPy names, exception, words of the message ----

H, W, Y = np.zeros((4, 3), np.float32), np.zeros((5, 3), np.float32), np.arange(4)
BOTH = {
    "features that differ": ({"weight": W[:, :2]}, ValueError, ["weight", "3", "(5, 2)"]),
    "no classes": ({"weight": W[:0]}, ValueError, ["weight", "(0, 3)", "class"]),
    "weight of one axis": ({"weight": W[0]}, ValueError, ["weight", "(3,)"]),
    "hidden without an axis": ({"hidden": np.float32(1)}, ValueError, ["0-dimensional"]),
    "integer hidden": ({"hidden": H.astype(np.int64)}, TypeError, ["int64", "float32"]),
    "weight of another dtype": ({"weight": W.astype(np.float64)}, TypeError, ["weight", "float32", "float64"]),
    "short bias": ({"bias": W[:4, 0]}, ValueError, ["bias", "(4,)", "(5,)"]),
    "short class weight": ({"class_weight": W[:4, 0]}, ValueError, ["weight", "(4,)", "(5,)"]),
    "long logit bias": ({"logit_bias": np.zeros(6, np.float32)}, ValueError, ["logit_bias", "(6,)", "(5,)"]),
    "id out of range": ({"target": [0, 1, 5, 3]}, IndexError, ["target[2]", "5", "out of range", "5 classes"]),
    "negative id": ({"target": [0, -1, 5, 3]}, IndexError, ["target[1]", "-1", "out of range"]),
    "too few ids": ({"target": [0, 1, 2]}, ValueError, ["target", "(3,)", "(4,)"]),
    "boolean target": ({"target": Y > 1}, TypeError, ["target", "bool"]),
    "probabilities of the wrong shape": ({"target": np.zeros((4, 4), np.float32)}, ValueError, ["(4, 4)", "(4, 5)"]),
    "unknown backward": ({"backward": "dropped"}, ValueError, ["backward", "dropped", "exact", "sampled"]),
    "threshold of zero": ({"threshold": 0.0}, ValueError, ["threshold", "0.0", "(0, 1]"]),
    "threshold above one": ({"threshold": 1.5}, ValueError, ["threshold", "1.5", "(0, 1]"]),
    "threshold of text": ({"threshold": "1"}, TypeError, ["threshold", "str"]),
    "seed of float": ({"seed": 0.5, "backward": "sampled"}, TypeError, ["seed", "float"]),
    "seed of text with the exact backward": ({"seed": "a"}, TypeError, ["seed", "str"]),
    "seed beyond 64 bits": ({"seed": 2**64}, ValueError, ["seed", str(2**64), "2**64"]),
    "no features": ({"hidden": H[:, :0], "weight": W[:, :0]}, ValueError, ["at least one feature", "(4, 0)"]),
    "unsigned id beyond int64": (
        {"target": np.array([0, 1, 2**64 - 100, 3], np.uint64)},
        IndexError,
        ["target", str(2**64 - 100), "out of range"],
    ),
    "id at a place of two dimensions": (
        {"hidden": np.zeros((2, 3, 3), np.float32), "target": [[0, 1, 2], [0, 99, 1]]},
        IndexError,
        ["target[1, 1] = 99 is out of range for 5 classes"],
    ),
    "probabilities with an ignored id": (
        {"target": np.full((4, 5), 0.2, np.float32), "ignore_index": 3},
        ValueError,
        ["ignore_index", "3", "probabilities"],
    ),
    "softcap that float32 cannot hold": ({"softcap": 1e39}, ValueError, ["softcap", "1e+39", "8.5e+37", "float32"]),
    "chunk of bool": ({"chunk_tokens": True}, TypeError, ["chunk_tokens", "bool"]),
    "no tokens in a chunk": ({"chunk_tokens": 0}, ValueError, ["chunk_tokens", "0", "1"]),
    "chunk of float": ({"chunk_tokens": 1.5}, TypeError, ["chunk_tokens", "float"]),
    "smoothing above one": ({"label_smoothing": 2.0}, ValueError, ["label_smoothing", "2.0"]),
    "negative temperature": ({"temperature": -1.0}, ValueError, ["temperature", "-1.0"]),
    "denominator with sum": ({"denominator": 3.0, "reduction": "sum"}, ValueError, ["denominator", "mean", "sum"]),
}
TORCH_NAMES = {
    "hidden": "input",
    "weight": "linear_weight",
    "bias": "linear_bias",
    "class_weight": "weight",
}


def raises(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_return_grad_is_on_or_off():
    words = ["return_grad must be True or False", "'no'"]
    raises(lambda: fastloss.linear_cross_entropy(H, W, Y, return_grad="no"), TypeError, words)


@pytest.mark.parametrize("case", BOTH)
def test_bad_input_raises(case):
    changed, error, words = BOTH[case]
    call = {"hidden": H, "weight": W, "target": Y, "return_grad": True} | changed
    raises(lambda: fastloss.linear_cross_entropy(**call), error, words)


@pytest.mark.skipif(torch is None, reason="needs PyTorch")
@pytest.mark.parametrize("case", BOTH)
def test_bad_input_of_pytorch_raises(case):
    changed, error, words = BOTH[case]
    call = {"hidden": H, "weight": W, "target": Y} | changed
    tensors = ("hidden", "weight", "target", "bias", "class_weight", "logit_bias")
    call = {TORCH_NAMES.get(name, name): torch.as_tensor(np.asarray(v)) if name in tensors else v for name, v in call.items()}
    if call["linear_weight"].is_floating_point():
        call["linear_weight"].requires_grad_()
    raises(lambda: fastloss.torch.linear_cross_entropy(**call), error, words)
    assert call["linear_weight"].grad is None


@pytest.mark.skipif(torch is None, reason="needs PyTorch")
def test_bad_input_that_only_pytorch_can_be_given():
    h, w, y = torch.zeros(4, 3), torch.zeros(5, 3, requires_grad=True), torch.arange(4)
    linear = fastloss.torch.linear_cross_entropy
    raises(lambda: linear(h, w, torch.zeros(4, 5), ignore_index=2), ValueError, ["ignore_index", "probabilities"])
    raises(lambda: linear(h, w, y.to("meta")), ValueError, ["target", "meta", "cpu"])
    raises(lambda: linear(h.numpy(), w, y), TypeError, ["input", "ndarray"])
    raises(lambda: linear(h, w, y, options="fast"), TypeError, ["options", "str", "LinearCrossEntropyOptions"])
    raises(lambda: linear(h, w, y, options={"batch_chunk_size": 0}), TypeError, ["options", "dict"])
    raises(lambda: linear(h, w, y, chunk_tokens=torch.tensor(True)), TypeError, ["chunk_tokens", "integer", "Tensor"])
    raises(lambda: linear(h, w, y, backward="sampled", seed=torch.ones(1).long()), TypeError, ["seed", "integer", "Tensor"])
    raises(lambda: linear(h, w, y, backward=["exact"]), ValueError, ["backward", "exact"])
    raises(lambda: linear(h[None], torch.zeros(5, 2, 3), y), ValueError, ["input", "(N, H)"])
    raises(lambda: linear(h, torch.zeros(5, 2, 3), y), ValueError, ["target", "(4, 2)", "(4,)"])
    soft = torch.full((4, 5), 0.2, requires_grad=True)
    raises(lambda: linear(h, w, soft, backward="sampled"), ValueError, ["target", "sampled", "detach"])
    raises(lambda: fastloss.torch.linear_logit_stats(h, w, torch.zeros(4)), TypeError, ["target", "float32"])
    raises(lambda: fastloss.torch.linear_logit_stats(h, w, y + 3), IndexError, ["target[2]", "5 classes"])


def test_bad_statistics_raise():
    raises(lambda: fastloss.linear_logit_stats(H, W, Y, want="loss"), ValueError, ["want", "loss"])
    raises(lambda: fastloss.linear_logit_stats(H, W, [0, 1, 2, 5]), IndexError, ["target[3]", "5 classes"])
    several = np.zeros((4, 2), np.int64)
    several[2, 1] = 5
    raises(lambda: fastloss.linear_logit_stats(H, W, several), IndexError, ["target[2, 1] = 5", "5 classes"])
    raises(lambda: fastloss.linear_logit_stats(H, W, np.ma.array(Y)), TypeError, ["target", "mask"])
    raises(lambda: fastloss.linear_logit_stats(H, W, np.zeros(4)), TypeError, ["target", "float64"])
    raises(lambda: fastloss.linear_logit_stats(H, W, want="rank"), ValueError, ["rank", "target"])
