# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays as the kernels take them: checked, and copied only where there is no other way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastloss import _cpu, _options

Array: TypeAlias = NDArray[Any]

# By name, so that the bfloat16 of ml_dtypes is known without importing that package.
DTYPE_CODES = {"float32": _cpu.F32, "float64": _cpu.F64, "float16": _cpu.F16, "bfloat16": _cpu.BF16}


def address(array: Array | None) -> int:
    """Returns the address of the first element, 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


def tensor(array: Array, axis: int) -> _cpu.Tensor:
    """Describes a native floating-point array for the kernels."""
    itemsize = array.itemsize
    strides = tuple(stride // itemsize for stride in array.strides)
    return address(array), DTYPE_CODES[array.dtype.name], array.shape, strides, axis


def call_of(
    logits: Array, target: Array, weight: Array | None, bias: Array | None, axis: int, options: _options.LossOptions
) -> _cpu.Call:
    """A cross-entropy as the kernels take it; class ids are contiguous."""
    ids = probabilities = None
    if target.dtype.kind in "iu":
        ids = (address(target), target.itemsize)
    else:
        probabilities = tensor(target, axis)
    transform = (options.temperature, options.softcap, address(bias))
    inputs = (tensor(logits, axis), ids, probabilities, address(weight), transform)
    return *inputs, options.ignore_index, options.label_smoothing, options.z_loss


def plain(value: ArrayLike, name: str) -> Array:
    """Returns value as an array; the mask of a masked one would be lost without a word."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got {type(value).__name__}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that are bfloat16 or need a gradient
        kind = type(value).__name__
        raise TypeError(f"{name} must be an array, or what NumPy makes one of; got {kind}: {error}") from error


def floating(value: ArrayLike, name: str) -> Array:
    """Returns value as a native array of one of the four dtypes, itself where it is one already, with any strides."""
    array = plain(value, name)
    if array.dtype.name not in DTYPE_CODES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {array.dtype}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not native.flags.aligned or any(stride % native.itemsize for stride in native.strides):
        return native.copy()  # a field of packed records, for instance: its strides are no whole numbers of elements
    return native


def accumulator_dtype(logits: Array) -> np.dtype[Any]:
    """Returns the dtype in which sums over these logits are kept, and that of their losses."""
    return np.dtype(np.float64 if logits.dtype == np.float64 else np.float32)


def per_class(value: ArrayLike | None, name: str, logits: Array, axis: int) -> Array | None:
    """Returns one number for each class, as the kernels take weights and biases."""
    if value is None:
        return None
    array = plain(value, name)
    if array.dtype.kind not in "iuf" and array.dtype.name not in DTYPE_CODES:
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    _options.check_per_class(array.shape, logits.shape[axis], name)
    return np.ascontiguousarray(array, dtype=accumulator_dtype(logits))


def class_ids(array: Array) -> Array:
    """Returns integer class ids as contiguous int32 or int64."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
        raise IndexError(f"target holds {array.max()}, which is out of range for any number of classes")
    dtype = np.int32 if array.dtype.kind == "i" and array.dtype.itemsize == 4 else np.int64
    return np.asarray(array, dtype=dtype, order="C")


def fresh(like: Array) -> Array:
    """Returns an uninitialised array with the shape, dtype and memory order of another; a large one in recycled memory."""
    if like.nbytes < _options.RECYCLED_FROM:
        return np.empty_like(like, subok=False)
    outermost_first = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
    array = _recycled([like.shape[axis] for axis in outermost_first], like.dtype)
    return array.transpose(np.argsort(outermost_first))


def fresh_matrix(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Returns an uninitialised matrix; a large one in recycled memory."""
    if shape[0] * shape[1] * dtype.itemsize < _options.RECYCLED_FROM:
        return np.empty(shape, dtype)
    return _recycled(shape, dtype)


def _recycled(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    block = memoryview(_cpu.RecycledBlock(math.prod(shape) * dtype.itemsize))
    array: Array = np.ndarray(shape, dtype, buffer=block)
    return array
