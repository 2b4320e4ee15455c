# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA module as it runs under the emulation of tests/cuda_emulation: its device memory is that of NumPy."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from binding import CODES, REDUCTIONS, address, tensor
from helpers import accumulation

FOLDER = Path(os.environ.get("FASTLOSS_CUDA_EMULATION", Path(__file__).parent.parent / "build" / "emulation"))
DEVICE = (0, 0)  # index, stream


def load_emulation():
    """The module; skips the tests of a file where it has not been built."""
    found = sorted(FOLDER.glob("_cuda_emulated.*.so"))
    if not found:
        pytest.skip(f"needs _cuda_emulated in {FOLDER}: `make emulation` builds it", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CudaCall:
    """One cross-entropy, as tests/binding.py has it for the CPU. All outputs are poisoned first."""

    def __init__(self, module, logits, target, options, axis=-1, reduction="mean", denominator=None):
        self.module, self.logits, self.target, self.options, self.axis = module, logits, target, options, axis
        self.reduction, self.denominator = reduction, denominator
        rows = logits.size // logits.shape[axis] if logits.shape[axis] else 0
        self.loss = np.full(rows if reduction == "none" else (), 777, accumulation(logits.dtype))
        self.saved = np.full((rows, 3), 777.0)
        self.scale = np.full((), 777.0)

    def _inputs(self):
        o = self.options
        soft = self.target.dtype in CODES
        return (
            tensor(self.logits, self.axis),
            None if soft else (self.target.ctypes.data, self.target.itemsize),
            tensor(self.target, self.axis) if soft else None,
            address(o.weight),
            (o.temperature, o.softcap or 0.0, address(o.bias)),
            o.ignore_index,
            o.label_smoothing,
            o.z_loss,
        )

    def forward(self, gradient=None):
        room = workspace(self.module, self.logits, self.axis)
        self.module.cross_entropy(
            *self._inputs(),
            REDUCTIONS[self.reduction],
            self.denominator,
            self.loss.ctypes.data,
            self.saved.ctypes.data,
            self.scale.ctypes.data,
            None if gradient is None else tensor(gradient, self.axis),
            room.ctypes.data,
            *DEVICE,
        )
        return self.loss

    def backward(self, gradient, upstream=1.0):
        upstream = np.asarray(upstream, accumulation(self.logits.dtype))
        self.module.cross_entropy_backward(
            *self._inputs(),
            self.scale.ctypes.data,
            self.saved.ctypes.data,
            (upstream.ctypes.data, CODES[upstream.dtype], 0 if upstream.ndim == 0 else 1),
            tensor(gradient, self.axis),
            *DEVICE,
        )
        return gradient

    def soft_target_gradient(self, out, upstream=1.0):
        o = self.options
        upstream = np.asarray(upstream, accumulation(self.logits.dtype))
        self.module.soft_target_gradient(
            tensor(self.logits, self.axis),
            address(o.weight),
            (o.temperature, o.softcap or 0.0, address(o.bias)),
            o.label_smoothing,
            self.scale.ctypes.data,
            self.saved.ctypes.data,
            (upstream.ctypes.data, CODES[upstream.dtype], 0 if upstream.ndim == 0 else 1),
            tensor(out, self.axis),
            *DEVICE,
        )
        return out


def workspace(module, logits, axis):
    """Room for a call, full of NaN."""
    return np.full(module.workspace_bytes(tensor(logits, axis), *DEVICE), 0xFF, np.uint8)


STATISTICS = ("logprob", "logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax", "rank")


def statistics(module, logits, ids=None, want=STATISTICS, options=None, axis=-1):
    """The wanted statistics by name, and `saved`."""
    rows = logits.size // logits.shape[axis]
    k = 0 if ids is None else ids.size // max(rows, 1)
    out = {}
    for name in want:
        integer, per_target = name in ("argmax", "rank"), name in ("logprob", "rank")
        if per_target and ids is None:
            continue
        out[name] = np.full((rows, k) if per_target else rows, 777, np.int64 if integer else accumulation(logits.dtype))
    saved = np.full((rows, 3), 777.0)
    room = workspace(module, logits, axis)
    module.statistics(
        tensor(logits, axis),
        None if ids is None else (ids.ctypes.data, ids.itemsize),
        k,
        (options.temperature, options.softcap or 0.0, address(options.bias)) if options else (1.0, 0.0, 0),
        tuple(address(out.get(name)) for name in STATISTICS),
        saved.ctypes.data,
        room.ctypes.data,
        *DEVICE,
    )
    return out, saved


def statistics_gradient(module, logits, saved, coefficients, ids, g, gradient, options=None, axis=-1):
    """p (a + b x + c p) + d, less g at the ids."""
    rows = logits.size // logits.shape[axis]
    module.gradient(
        tensor(logits, axis),
        saved.ctypes.data,
        coefficients.ctypes.data,
        None if ids is None else (ids.ctypes.data, ids.itemsize),
        0 if ids is None else ids.size // max(rows, 1),
        address(g),
        (options.temperature, options.softcap or 0.0, address(options.bias)) if options else (1.0, 0.0, 0),
        tensor(gradient, axis),
        *DEVICE,
    )
    return gradient
