# SPDX-License-Identifier: Apache-2.0
"""What tensors may be passed, and the words when they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import _options
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


def check_rows_target(logits: Tensor, target: Tensor, dim: int) -> Tensor:
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
        return target
    ids = as_class_ids(target)
    _options.check_ids_shape(ids.shape, logits.shape, dim, "input")
    return ids


def as_class_ids(target: Tensor) -> Tensor:
    """Class ids of any integer dtype, contiguous and of 4 or 8 bytes."""
    if target.dtype not in _IDS:
        if target.dtype == torch.bool or target.dtype.is_floating_point or target.dtype.is_complex or target.is_quantized:
            raise TypeError(f"target must hold integer class ids or floating-point probabilities, got {_kind(target)}")
        target = target.long()
    if target.layout is not torch.strided:
        raise TypeError(f"target must be a dense tensor, got {target.layout}")
    return target.contiguous()


def per_class(name: str, value: Tensor, logits: Tensor, dim: int, constant: bool = True) -> Tensor:
    """One number a class, in the accumulation type; a constant, unless there is a gradient for it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _options.check_per_class(value.shape, logits.shape[dim], name)
    if value.dtype not in CODES:
        raise TypeError(f"{name} must be of a floating-point dtype, got {_kind(value)}")
    check_device(name, value, logits)
    if constant and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient from this loss: pass {name}.detach()")
    return value.to(accumulation_dtype(logits.dtype)).contiguous()


def divides_afterwards(denominator: float | Tensor, reduction: str) -> bool:
    """Whether the sum is divided in a step of its own: by a tensor, and by a number that a compiled graph may not know yet."""
    if isinstance(denominator, Tensor):
        _options.check_denominator_use(reduction)
        if denominator.ndim != 0:
            raise ValueError(f"denominator must be a number or a 0-d tensor, got a tensor of shape {tuple(denominator.shape)}")
        return True
    if not torch.compiler.is_compiling():
        return False
    _options.check_denominator_use(reduction)
    torch._check(denominator > 0.0)
    return True


def divided(loss: Tensor, denominator: float | Tensor) -> Tensor:
    """The sum by what divides it afterwards."""
    return loss / (denominator.to(loss.dtype) if isinstance(denominator, Tensor) else denominator)


def check_device(name: str, value: Tensor, logits: Tensor) -> None:
    """All tensors of a call live together."""
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device}, but the logits are on {logits.device}")


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
