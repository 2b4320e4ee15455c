# SPDX-License-Identifier: Apache-2.0
"""What tensors may be passed, and the words when they do not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as legacy

from fastloss import _cpu, _options
from fastloss.torch import ops
from fastloss.torch.ops import CODES, accumulation_dtype

_IDS = (torch.int64, torch.int32)


def check_logits(name: str, logits: Tensor, cuda: bool = False) -> None:
    """A dense floating-point tensor on the CPU; on a GPU too, where the function has kernels for it."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.is_cpu and logits.dtype in CODES and logits.layout is torch.strided:
        return
    if logits.dtype not in CODES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {_kind(logits)}")
    if logits.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {logits.layout}")
    if cuda and logits.is_cuda:
        if not torch.compiler.is_compiling():
            ops.gpu()
    elif logits.device.type not in ("cpu", "meta"):
        places = "CPU and CUDA tensors" if cuda else "CPU tensors"
        raise NotImplementedError(f"{name} is on {logits.device}: this function of fastloss.torch works on {places}")


def check_rows_target(logits: Tensor, target: Tensor, dim: int, ignore_index: object) -> Tensor:
    """Class ids, contiguous and of 4 or 8 bytes, or probabilities as they are."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if (
        target.dtype is torch.int64
        and target.is_contiguous()
        and target.shape == _options.row_shape(logits.shape, dim)
        and target.is_cpu
        and logits.is_cpu
    ):
        return target  # the usual case, checked with the fewest steps
    check_device("target", target, logits)
    if target.dtype in CODES:
        if target.layout is not torch.strided:
            raise TypeError(f"target must be a dense tensor, got {target.layout}")
        _options.check_probabilities_shape(target.shape, logits.shape, "input")
        _options.check_ignore_index_use(ignore_index)
        return target
    ids = as_class_ids("target", target)
    _options.check_ids_shape(ids.shape, logits.shape, dim, "dim", "input")
    return ids


def as_class_ids(name: str, ids: Tensor, expected: str = "integer class ids or floating-point probabilities") -> Tensor:
    """Class ids of any integer dtype, contiguous and of 4 or 8 bytes."""
    if ids.dtype not in _IDS:
        if ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.is_quantized:
            raise TypeError(f"{name} must hold {expected}, got {_kind(ids)}")
        ids = ops.in_memory(name, ids)
        ids = _signed(name, ids) if ids.dtype is torch.uint64 else ids.long()
    if ids.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {ids.layout}")
    return ids.contiguous()


def _signed(name: str, ids: Tensor) -> Tensor:
    """Unsigned ids of 64 bits: those beyond int64 must not come back as negative ones, which may be ignored."""
    wrapped = ids.long()
    beyond = wrapped < 0
    if ops.eager(ids) and ids.is_cpu and bool(beyond.any()):
        value = int(wrapped[beyond][0]) + 2**64
        raise IndexError(f"{name} holds {value}, which is out of range for any number of classes")
    return wrapped.masked_fill(beyond, 2**63 - 1)


def check_ids(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises IndexError for an id out of range where no kernel will, as far as they may be looked at."""
    if target.dtype not in CODES and target.is_cpu and ops.readable(target):
        ids = target.contiguous()
        _cpu.check_targets((ids.data_ptr(), ids.element_size()), ids.shape, classes, ignore_index)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction by PyTorch's arguments of before, which a compiled graph takes, too."""
    if not torch.compiler.is_compiling():
        word: str = legacy.legacy_get_string(size_average, reduce)
        return word
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def per_class(name: str, value: Tensor, logits: Tensor, dim: int, constant: bool = True) -> Tensor:
    """One number a class, in the accumulation type; a constant, unless there is a gradient for it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _options.check_per_class(value.shape, logits.shape[dim], name)
    if value.dtype not in CODES:
        raise TypeError(f"{name} must be of a floating-point dtype, got {_kind(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    check_device(name, value, logits)
    if constant and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient from this loss: pass {name}.detach()")
    value = ops.in_memory(name, value)
    return value.to(accumulation_dtype(logits.dtype)).contiguous()


def divides_afterwards(denominator: float | Tensor, reduction: str, logits: Tensor) -> bool:
    """Whether the sum is divided in a step of its own: by a tensor, and by a number that a compiled graph may not know yet.

    The number in a tensor is looked at where nothing has to wait for it.
    """
    if not isinstance(denominator, Tensor):
        if not torch.compiler.is_compiling():
            return False
        _options.check_denominator_use(reduction)
        torch._check(denominator > 0.0)
        return True
    _options.check_denominator_use(reduction)
    if denominator.ndim != 0:
        raise ValueError(f"denominator must be a number or a 0-d tensor, got a tensor of shape {tuple(denominator.shape)}")
    if denominator.dtype == torch.bool or denominator.dtype.is_complex:
        raise TypeError(f"denominator must be a real number, got {_kind(denominator)}")
    if denominator.device != logits.device and not denominator.is_cpu:
        raise ValueError(f"denominator is on {denominator.device}, but the logits are on {logits.device}")
    if denominator.is_cpu and ops.eager(denominator):
        _options.check_denominator(denominator.item())
    return True


def divided(loss: Tensor, denominator: float | Tensor) -> Tensor:
    """The sum by what divides it afterwards."""
    return loss / (denominator.to(loss.dtype) if isinstance(denominator, Tensor) else denominator)


def loss_options(*choices: Any) -> _options.LossOptions:
    """As `_options.loss_options`, with 0-d tensors for numbers."""
    return _options.loss_options(*map(number_of, choices))


def number_of(value: Any) -> Any:
    """A 0-d tensor that is a constant as its number, as PyTorch takes it; everything else as it is."""
    if (
        isinstance(value, Tensor)
        and value.ndim == 0
        and not (value.requires_grad or ops.is_dual(value))
        and ops.readable(value)
    ):
        return value.item()
    return value


def check_device(name: str, value: Tensor, logits: Tensor) -> None:
    """All tensors of a call live together."""
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device}, but the logits are on {logits.device}")


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
