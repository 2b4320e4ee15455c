# SPDX-License-Identifier: Apache-2.0
"""Between tensors and the oracle; logits, targets and options; CUDA without a GPU."""

import contextlib
import importlib
import sys

import torch

import fastloss
import fastloss.torch
import reference
from fastloss.torch import ahead, autograd, linear_ops, operators, ops
from helpers import bfloat16
from reference import Options

TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Those that have a gradient.
STATISTICS = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob")


def array(tensor):
    """The tensor as an array of the same dtype: bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


def wide(tensor):
    return reference.wide(tensor.detach().cpu().to(torch.float64).numpy())


def oracle_options(weight=None, logit_bias=None, **options):
    """The oracle's options from the arguments of a call."""
    names = ("ignore_index", "label_smoothing", "z_loss", "temperature", "softcap")
    arrays = {"weight": weight, "bias": logit_bias}
    return Options(
        **{name: options[name] for name in names if name in options},
        **{name: array(value) for name, value in arrays.items() if value is not None},
    )


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and array(one).tobytes() == array(other).tobytes()


def here(options):
    """With tensors on the device of the test."""
    device = torch.get_default_device()
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


# The same numbers on every device; tensors go to that of the fixture `device`.
def seeded(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 1000003 * len(shape) + sum(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return (scale * values).to(dtype).to(torch.get_default_device())


def seeded_ids(classes, *shape, seed=0):
    ids = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed + sum(shape)), device="cpu")
    return ids.to(torch.get_default_device())


def seeded_probabilities(*shape, dim=1, seed=0):
    return torch.softmax(seeded(*shape, seed=seed + 17), dim)


def class_dim(shape):
    return 1 if len(shape) > 1 else 0


def ids_of(shape, ignored=True):
    """Class ids for logits of this shape."""
    dim = class_dim(shape)
    ids = seeded_ids(shape[dim], *shape[:dim], *shape[dim + 1 :])
    if ignored and ids.numel() > 2:
        ids.view(-1)[1] = -100
    return ids


def target_of(shape, soft):
    return seeded_probabilities(*shape, dim=class_dim(shape)).requires_grad_() if soft else ids_of(shape)


# Options of losses over five classes.
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


def run(function, logits, target, *args, upstream=None, **kwargs):
    """Loss, and the gradients by logits and soft target."""
    logits = logits.clone().requires_grad_()
    target = target.clone().requires_grad_(target.is_floating_point())
    loss = function(logits, target, *args, **kwargs)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), logits.grad, target.grad


def np_rows(tensor, dim):
    return reference.as_rows(array(tensor), dim)


@contextlib.contextmanager
def torch_over_emulation(emulated, monkeypatch):
    """fastloss.torch.cuda and what is built on it over the emulated module: losses of CPU tensors go there, as on a GPU."""
    monkeypatch.setitem(sys.modules, "fastloss._cuda", emulated)
    monkeypatch.setattr(fastloss, "_cuda", emulated, raising=False)
    names = ("cuda", "cuda_projection", "cuda_linear")
    for name in names:
        monkeypatch.delitem(sys.modules, f"fastloss.torch.{name}", raising=False)
    cuda, projection, linear = (importlib.import_module(f"fastloss.torch.{name}") for name in names)
    monkeypatch.setattr(cuda, "where", lambda tensor: (0, 0))
    monkeypatch.setattr(projection, "_expected", lambda counts: (True, None))
    monkeypatch.setattr(linear_ops, "is_on_gpu", lambda tensor: True)
    for name in ("cross_entropy", "cross_entropy_backward", "soft_target_gradient"):
        monkeypatch.setattr(ops, name, getattr(cuda, name))
    of_gpu = ahead.ExpectationOfGpu(ops.CPU)
    monkeypatch.setattr(autograd, "expectation_of", lambda logits: of_gpu)
    monkeypatch.setattr(autograd, "expectation", ahead.Expectation())  # in place: for 1, whatever tests before brought
    monkeypatch.setattr(operators, "factor", lambda scale: scale)
    yield cuda, linear
    for name in names:
        del sys.modules[f"fastloss.torch.{name}"]
        delattr(fastloss.torch, name)


@contextlib.contextmanager
def nothing_made_ahead(expectation):
    """Forward makes no gradient."""
    expectation.wait(10**6)
    yield
    expectation._to_come = 0


def watched_trips(monkeypatch):
    """What the kernels of a GPU do from now on: forward alone or with the gradient; backward, whether it kept or made that."""
    names, mark = [], 77.0

    def forward(*arguments, **options):
        names.append("both" if len(arguments) > 8 else "forward")
        return run_forward(*arguments, **options)

    def backward(*arguments):
        *others, grad, expected = arguments
        if grad is None:
            names.append("made")
            return run_backward(*arguments)
        before = grad.clone()
        run_backward(*others, grad.fill_(mark), expected)
        kept = bool((grad == mark).all())
        names.append("kept" if kept else "made")
        return grad.copy_(before) if kept else grad

    run_forward, run_backward = ops.cross_entropy, ops.cross_entropy_backward
    monkeypatch.setattr(ops, "cross_entropy", forward)
    monkeypatch.setattr(ops, "cross_entropy_backward", backward)
    return names
