# SPDX-License-Identifier: Apache-2.0
"""Tensors of a GPU to its kernels: the functions of `ops` that see a pointer, for CUDA. Imported at the first CUDA tensor.

Nothing here waits for the GPU, and all memory is PyTorch's: work goes to PyTorch's current stream, so that side streams and
CUDA graphs hold. That is why the factor `scale` of the mean stays on the GPU, and why a class id out of range cannot raise: its
row becomes NaN. With the environment variable `FASTLOSS_DEBUG=1` every call checks its ids, at the price of waiting.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastloss import _cpu, _cuda
from fastloss._options import NONE, row_shape
from fastloss.torch import ops
from fastloss.torch.ahead import OnGpu
from fastloss.torch.ops import CODES, Options, accumulation_dtype

Function = TypeVar("Function", bound=Callable[..., Any])

DEBUG = os.environ.get("FASTLOSS_DEBUG", "0") not in ("", "0")


def device_count() -> int:
    """How many GPUs the kernels could run on."""
    return _cuda.device_count()


def where(tensor: Tensor) -> tuple[int, int]:
    """Index of its GPU, and the stream."""
    return tensor.device.index or 0, torch.cuda.current_stream(tensor.device).cuda_stream


def on_its_gpu(function: Function) -> Function:
    """Runs the function with the GPU of its first argument as the current one: that is where kernels start."""

    @functools.wraps(function)
    def run(first: Any, *arguments: Any, **options: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first.hidden
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return function(first, *arguments, **options)
        with torch.cuda.device(tensor.device):
            return function(first, *arguments, **options)

    return run  # type: ignore[return-value]


def workspace(logits: Tensor, dim: int, where: tuple[int, int]) -> Tensor:
    """What a kernel over these logits needs besides its results."""
    return torch.empty(_cuda.workspace_bytes(ops.describe(logits, dim), *where), dtype=torch.uint8, device=logits.device)


def check_ids(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises IndexError for the first class id out of range; waits for the GPU."""
    wrong = (target < 0) | (target >= classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    places = wrong.flatten().nonzero()
    if len(places):
        first = int(places[0])
        place = ", ".join(str(int(i)) for i in np.unravel_index(first, target.shape))
        place = f"[{place}]" if place else ""
        raise IndexError(f"target{place} = {int(target.flatten()[first])} is out of range for {classes} classes")


@on_its_gpu
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    reduction: int,
    denominator: float | None,
    keep: bool,
    grad: Tensor | None = None,
    upstream: float | Tensor = 1.0,
    *,
    as_with_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `ops.cross_entropy`, with the factor 1 / denominator as a tensor."""
    dim = options.dim
    if DEBUG and target.dtype not in CODES:
        check_ids(target, logits.shape[dim], options.ignore_index)
    rows = row_shape(logits.shape, dim)
    loss = logits.new_empty(rows if reduction == NONE else (), dtype=accumulation_dtype(logits.dtype))
    saved = logits.new_empty((*rows, _cpu.SAVED_FIELDS), dtype=torch.float64) if keep else None
    scale = logits.new_empty((), dtype=torch.float64)
    place = where(logits)
    room = workspace(logits, dim, place)
    _cuda.cross_entropy(
        ops.call_of(logits, target, weight, bias, options),
        reduction,
        denominator,
        loss.data_ptr(),
        ops.address(saved),
        scale.data_ptr(),
        None if grad is None else ops.describe(grad, dim),
        ops.describe_upstream(upstream) if isinstance(upstream, Tensor) else None,
        as_with_gradient,
        room.data_ptr(),
        *place,
    )
    return loss, saved, scale


@on_its_gpu
def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    scale: Tensor,
    options: Options,
    grad: Tensor | None = None,
    expected: OnGpu | None = None,
) -> Tensor:
    """As `ops.cross_entropy_backward`."""
    grad = ops.fresh(logits) if grad is None else grad
    made_for, following, surprised = expected or (None, None, None)
    upstream = ops.upstream_of(upstream)
    _cuda.cross_entropy_backward(
        ops.call_of(logits, target, weight, bias, options),
        scale.data_ptr(),
        saved.data_ptr(),
        ops.describe_upstream(upstream),
        (ops.address(made_for), ops.address(following), ops.address(surprised)),
        ops.describe(grad, options.dim),
        *where(logits),
    )
    return grad


@on_its_gpu
def soft_target_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    scale: Tensor,
    options: Options,
) -> Tensor:
    """As `ops.soft_target_gradient`."""
    out = ops.fresh(target)
    upstream = ops.upstream_of(upstream)
    _cuda.soft_target_gradient(
        ops.call_of(logits, target, weight, bias, options),
        scale.data_ptr(),
        saved.data_ptr(),
        ops.describe_upstream(upstream),
        ops.describe(out, options.dim),
        *where(logits),
    )
    return out


@on_its_gpu
def statistics(
    logits: Tensor,
    target: Tensor | None,
    k: int,
    bias: Tensor | None,
    dim: int,
    softcap: float,
    temperature: float,
    outputs: list[Tensor],
    want: list[bool],
) -> None:
    """Fills the outputs of `ops.statistics`; `target` is contiguous."""
    if DEBUG and target is not None:
        check_ids(target, logits.shape[dim], None)
    place = where(logits)
    room = workspace(logits, dim, place)
    _cuda.statistics(
        ops.describe(logits, dim),
        ops.ids_of(target),
        k,
        (temperature, softcap, ops.address(bias)),
        tuple(out.data_ptr() if wanted else 0 for out, wanted in zip(outputs, want, strict=False)),
        outputs[-1].data_ptr(),
        room.data_ptr(),
        *place,
    )


@on_its_gpu
def gradient(
    logits: Tensor,
    saved: Tensor,
    coefficients: Tensor,
    target: Tensor | None,
    k: int,
    target_coefficients: Tensor | None,
    bias: Tensor | None,
    dim: int,
    softcap: float,
    temperature: float,
    grad: Tensor,
) -> None:
    """Fills the gradient of `ops.gradient`, from contiguous numbers of rows."""
    # A thread can keep one target while it overwrites the logits.
    out = ops.fresh(logits) if grad is logits and k > 1 else grad
    _cuda.gradient(
        ops.describe(logits, dim),
        saved.data_ptr(),
        coefficients.data_ptr(),
        ops.ids_of(target),
        k,
        ops.address(target_coefficients),
        (temperature, softcap, ops.address(bias)),
        ops.describe(out, dim),
        *where(logits),
    )
    if out is not grad:
        grad.copy_(out)


@on_its_gpu
def scale(grad: Tensor, upstream: Tensor) -> None:
    """Multiplies in place, at no cost where the upstream gradient is 1 and the other lies in one piece."""
    if not grad.is_contiguous():
        grad.mul_(upstream)
        return
    upstream = ops.upstream_of(upstream)
    of_loss = (upstream.data_ptr(), CODES[upstream.dtype], 0)
    _cuda.scale(grad.data_ptr(), grad.numel(), CODES[grad.dtype], of_loss, *where(grad))
