# SPDX-License-Identifier: Apache-2.0
"""Calls of the compiled module itself, into memory that the test owns: in place, at the end of a page, in two trips."""

import numpy as np

from fastloss import _cpu
from helpers import accumulation, bfloat16

CODES = {np.dtype(np.float32): _cpu.F32, np.dtype(np.float64): _cpu.F64, np.dtype(np.float16): _cpu.F16}
if bfloat16 is not None:
    CODES[bfloat16] = _cpu.BF16
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def tensor(array, axis):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return (array.ctypes.data, CODES[array.dtype], array.shape, strides, axis % array.ndim)


def saved_width(classes):
    """Numbers kept of a row: three, and the maximum of each block."""
    return 3 + -(-classes // _cpu.BLOCK)


def address(array):
    return 0 if array is None else array.ctypes.data


class Call:
    """One cross-entropy; arrays are taken as they are, and must fit the contract of the module."""

    def __init__(self, logits, target, options, axis=-1, reduction="mean", denominator=None):
        self.logits, self.target, self.options, self.axis = logits, target, options, axis
        self.reduction, self.denominator = reduction, denominator
        rows = logits.size // logits.shape[axis] if logits.shape[axis] else 0
        self.loss = np.zeros(rows if reduction == "none" else (), accumulation(logits.dtype))
        self.saved = np.zeros((rows, saved_width(logits.shape[axis])), np.float64)
        self.divisor = None

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

    def forward(self, gradient=None, sampled=None):
        """Writes the loss, and in the same trip the gradient, where memory for it is given, or a sample of it."""
        self.divisor = _cpu.cross_entropy(
            self._inputs(),
            REDUCTIONS[self.reduction],
            self.denominator,
            self.loss.ctypes.data,
            self.saved.ctypes.data,
            None if gradient is None else tensor(gradient, self.axis),
            1.0,
            sampled,
        )
        return self.loss

    def backward(self, gradient, upstream=1.0):
        """The second trip: the gradient from what `forward` saved."""
        upstream = np.asarray(upstream, accumulation(self.logits.dtype))
        step = 0 if upstream.ndim == 0 else 1
        scale = 1 / self.divisor if self.reduction == "mean" else 1.0
        _cpu.cross_entropy_backward(
            self._inputs(),
            scale,
            self.saved.ctypes.data,
            (upstream.ctypes.data, CODES[upstream.dtype], step),
            tensor(gradient, self.axis),
        )
        return gradient


def aligned_weight(array, logits):
    """Class weights or biases in the accumulation type."""
    return np.ascontiguousarray(array, accumulation(logits.dtype))
