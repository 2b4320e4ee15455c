# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA module as it runs under the emulation of tests/cuda_emulation: its device memory is that of NumPy."""

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from binding import CODES, REDUCTIONS, address, tensor
from helpers import accumulation

FOLDER = Path(os.environ.get("FASTLOSS_CUDA_EMULATION", Path(__file__).parent.parent / "build" / "emulation"))
DEVICE = (0, 0)  # index, stream


@functools.cache
def load_emulation():
    """The module; where it has not been built, skips the test, or the tests of the file, that asks for it."""
    found = sorted(FOLDER.glob("_cuda_emulated.*.so"))
    if not found:
        pytest.skip(f"needs _cuda_emulated in {FOLDER}: `make emulation` builds it", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def poisoned(logits):
    return np.full_like(logits, np.nan)


def parts_of(module, logits, axis=-1):
    """How many blocks share a row where the loss alone is made."""
    return module.plan(tensor(logits, axis), None, *DEVICE)[1]


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

    def forward(self, gradient=None, upstream=None, as_with_gradient=False):
        room = workspace(self.module, self.logits, self.axis)
        self.module.cross_entropy(
            self._inputs(),
            REDUCTIONS[self.reduction],
            self.denominator,
            self.loss.ctypes.data,
            self.saved.ctypes.data,
            self.scale.ctypes.data,
            None if gradient is None else tensor(gradient, self.axis),
            None if upstream is None else (upstream.ctypes.data, CODES[upstream.dtype], 0),
            as_with_gradient,
            room.ctypes.data,
            *DEVICE,
        )
        return self.loss

    def backward(self, gradient, upstream=1.0, expected=None):
        upstream = np.asarray(upstream, accumulation(self.logits.dtype))
        self.module.cross_entropy_backward(
            self._inputs(),
            self.scale.ctypes.data,
            self.saved.ctypes.data,
            (upstream.ctypes.data, CODES[upstream.dtype], 0 if upstream.ndim == 0 else 1),
            (0, 0, 0) if expected is None else expected.described(),
            tensor(gradient, self.axis),
            *DEVICE,
        )
        return gradient

    def soft_target_gradient(self, out, upstream=1.0):
        upstream = np.asarray(upstream, accumulation(self.logits.dtype))
        self.module.soft_target_gradient(
            self._inputs(),
            self.scale.ctypes.data,
            self.saved.ctypes.data,
            (upstream.ctypes.data, CODES[upstream.dtype], 0 if upstream.ndim == 0 else 1),
            tensor(out, self.axis),
            *DEVICE,
        )
        return out


class Expected:
    """What backward compares its upstream gradient with, and learns."""

    def __init__(self, made_for, following):
        self.made_for = None if made_for is None else np.asarray(made_for, np.float64)
        self.next = np.asarray(following, np.float64)
        self.surprised = np.asarray(7, np.int32)

    def described(self):
        return address(self.made_for), self.next.ctypes.data, self.surprised.ctypes.data


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


class Places:
    """Where sampled entries go, `slots` of them for each token; values of places that hold nothing are poisoned."""

    def __init__(self, tokens, slots, classes, dtype):
        self.count = np.zeros(tokens, np.int64)
        self.columns = np.full((tokens, slots), classes, np.int32)
        self.values = np.full((tokens, slots), np.nan, accumulation(dtype))

    def described(self):
        return (self.columns.shape[1], *(part.ctypes.data for part in (self.count, self.columns, self.values)))

    def kept(self):
        """Which places hold an entry."""
        return np.arange(self.columns.shape[1]) < self.count[:, None]

    def dense(self, classes):
        out = np.zeros((len(self.count), classes))
        rows, places = np.nonzero(self.kept())
        out[rows, self.columns[rows, places]] = self.values[rows, places]
        return out

    def by_class(self, classes):
        """(start, order): the places of each class, in the order of the tokens."""
        columns = self.columns.reshape(-1)
        order = np.argsort(columns, kind="stable")
        return np.searchsorted(columns[order], np.arange(classes + 1)), order


class ChunkCall(CudaCall):
    """The loss of a chunk of tokens, whose scale is that of all of them; and a sample of its gradient."""

    def forward(self, gradient=None):
        room = workspace(self.module, self.logits, self.axis)
        ids = None if self.target.dtype in CODES else (self.target.ctypes.data, self.target.itemsize)
        o, rows, classes = self.options, self.logits.shape[0], self.logits.shape[1]
        of_tokens = (rows, classes, CODES[self.logits.dtype], ids, address(o.weight), o.ignore_index)
        sums = np.full(self.module.REDUCTION_BYTES, 0xFF, np.uint8)
        reduced = self.reduction != "none"
        losses = np.full(rows, 777.0) if reduced else self.loss

        def reduce(losses, loss):
            out = (losses, loss, self.scale.ctypes.data)
            self.module.reduce_tokens(*of_tokens, REDUCTIONS[self.reduction], self.denominator, *out, sums.ctypes.data, *DEVICE)

        reduce(0, 0)
        self.module.cross_entropy_chunk(
            self._inputs(),
            self.scale.ctypes.data,
            losses.ctypes.data,
            reduced,
            self.saved.ctypes.data,
            None if gradient is None else tensor(gradient, self.axis),
            room.ctypes.data,
            *DEVICE,
        )
        if reduced:
            reduce(losses.ctypes.data, self.loss.ctypes.data)
        return self.loss

    def sample(self, threshold, seed, slots, numbers=None):
        """Entries of the gradient, after forward()."""
        numbers = np.arange(len(self.logits)) if numbers is None else numbers
        places = Places(int(numbers.max(initial=-1)) + 1, slots, self.logits.shape[1], self.logits.dtype)
        key = np.asarray(seed, np.int64)
        random = (key.ctypes.data, threshold, numbers.ctypes.data)
        self.module.sample_chunk(self._inputs(), self.saved.ctypes.data, random, places.described(), *DEVICE)
        return places


def multiply(module, places, factors, matrix, rows, by_class=None, sums=False):
    """The sparse matrix of the places times a dense one; or the sums of its rows."""
    start, order = by_class or (None, None)
    out = np.full(rows if sums else (rows, matrix.shape[1]), 777, matrix.dtype)
    entries = (rows, places.described(), factors.ctypes.data, address(start), address(order), CODES[matrix.dtype])
    if sums:
        module.row_sums(*entries, out.ctypes.data, *DEVICE)
    else:
        module.multiply(*entries, matrix.ctypes.data, matrix.shape[1], out.ctypes.data, *DEVICE)
    return out
