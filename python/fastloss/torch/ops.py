# SPDX-License-Identifier: Apache-2.0
"""Tensors to kernels. Only here, in `linear_ops` and `matmul`, and in `cuda` and `cuda_linear` for GPUs, are pointers seen.

Each operation is a plain function over CPU tensors; those of a GPU it hands on to `fastloss.torch.cuda`. `operators` makes
operators of PyTorch of them; in eager mode the callers skip the dispatcher, which costs more than a small loss does.

Statistics of rows (`saved`, coefficients) have the shape of the logits without the class dimension, and one more at the end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastloss import _cpu
from fastloss._options import INTEGER_STATISTICS, NONE, RECYCLED_FROM, STATISTICS, TARGET_STATISTICS, row_shape

CODES = {torch.float32: _cpu.F32, torch.float64: _cpu.F64, torch.float16: _cpu.F16, torch.bfloat16: _cpu.BF16}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_is_compiling = torch.compiler.is_compiling
functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
CPU = torch.device("cpu")
_SCALAR = {dtype: torch.empty((), dtype=accumulation_dtype(dtype), device=CPU) for dtype in CODES}
_TENSORS = (Tensor, torch.nn.Parameter)
# Autograd's own vmap (is_grads_batched) hands tensors to backward that only the dispatcher can take apart.
is_batched_by_autograd = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)


class Options(NamedTuple):
    """What a cross-entropy needs besides tensors."""

    dim: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0


def eager(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors that nobody traces or transforms, so that the kernels may be called at once."""
    if (
        _is_compiling()
        or functorch_active()
        or _dispatch_modes()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TENSORS or tensor.is_neg():
            return False
        # Zero tensors, which the dispatcher makes real, with strides of 0; and the meta device. An empty tensor has no memory.
        if not tensor.data_ptr() and (tensor.numel() or tensor.is_meta):
            return False
    return True


def is_traced() -> bool:
    """Whether torch.jit.trace writes down what is called."""
    return _tracing_state() is not None


def readable(tensor: Tensor) -> bool:
    """Whether the numbers of this tensor are there to be looked at, whatever is done with others."""
    if _is_compiling() or _dispatch_modes() or is_traced() or type(tensor) not in _TENSORS:
        return False
    return not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def forward_mode() -> bool:
    """Whether tensors may have tangents, which no kernel sees."""
    level: int = forward_ad._current_level
    return level >= 0


def is_dual(tensor: Tensor) -> bool:
    """Whether the tensor itself has a tangent."""
    return forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """The tensor; autograd's zero tensors, which have no memory, made real. Raises where the storage was resized to nothing.

    Of logits and ids it is the kernels that look, at no cost.
    """
    if _is_compiling() or functorch_active() or _dispatch_modes() or type(tensor) not in _TENSORS:
        return tensor
    if tensor.data_ptr() or tensor.is_meta or not tensor.numel():
        return tensor
    if tensor._is_zerotensor():
        return tensor.clone()
    raise ValueError(f"{name} has no memory: its storage was resized or freed, but it has {tensor.numel()} elements")


def upstream_of(gradient: Tensor) -> Tensor:
    """An upstream gradient as the kernels take it."""
    gradient = gradient.clone() if gradient._is_zerotensor() else gradient
    return gradient.resolve_neg().contiguous()


def describe_upstream(upstream: Tensor) -> _cpu.Upstream:
    """One number, or one a row, as the kernels take them."""
    return upstream.data_ptr(), CODES[upstream.dtype], 0 if upstream.ndim == 0 else 1


def gpu() -> ModuleType:
    """The functions of this file for CUDA tensors; raises where fastloss was built without them, or they find no device."""
    try:
        from fastloss.torch import cuda
    except ImportError as error:
        raise NotImplementedError(
            "a tensor is on a CUDA device, but this build of fastloss has no CUDA kernels: build it where nvcc is found, "
            "or with FASTLOSS_CUDA=ON to see what is missing"
        ) from error
    if cuda.device_count() == 0:
        raise RuntimeError(
            "fastloss finds no CUDA device, though PyTorch does: the driver may be too old for the CUDA version that fastloss "
            "was built with"
        )
    return cuda


def describe(tensor: Tensor, dim: int) -> _cpu.Tensor:
    """A tensor as the kernels take it, `dim` its class dimension."""
    return tensor.data_ptr(), CODES[tensor.dtype], tensor.shape, tensor.stride(), dim


def ids_of(target: Tensor | None) -> _cpu.Targets | None:
    """Contiguous class ids as the kernels take them."""
    return None if target is None else (target.data_ptr(), target.element_size())


def address(tensor: Tensor | None) -> int:
    """Where the first element is, 0 for None; raises where its storage was resized to nothing, which would look like None."""
    if tensor is None:
        return 0
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(f"a tensor of {tensor.numel()} elements has no memory: its storage was resized or freed")
    return place


def call_of(logits: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> _cpu.Call:
    """A cross-entropy as the kernels of either device take it."""
    dim, ignore_index, label_smoothing, z_loss, softcap, temperature = options
    ids: _cpu.Targets | None = None
    soft: _cpu.Tensor | None = None
    if target.dtype in CODES:
        soft = describe(target, dim)
    else:
        ids = (target.data_ptr(), target.element_size())
    transform = (temperature, softcap, address(bias))
    return describe(logits, dim), ids, soft, address(weight), transform, ignore_index, label_smoothing, z_loss


def fresh(like: Tensor) -> Tensor:
    """An uninitialised tensor with the shape, dtype and memory order of another; a large one in recycled memory."""
    if like.nbytes < RECYCLED_FROM or not like.is_cpu:
        return torch.empty_like(like)
    return _recycled(like.nbytes, like.dtype).as_strided(like.shape, torch.empty_like(like, device="meta").stride())


def fresh_matrix(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised matrix; a large one in recycled memory."""
    rows, columns = shape
    nbytes = rows * columns * dtype.itemsize
    if nbytes < RECYCLED_FROM:
        return torch.empty((rows, columns), dtype=dtype, device=CPU)
    return _recycled(nbytes, dtype).view(rows, columns)


def _recycled(nbytes: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(_cpu.RecycledBlock(nbytes), dtype=dtype)


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
    sampled: _cpu.SampledGradient | None = None,
    *,
    as_with_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, float | Tensor]:
    """The loss, what backward needs of each row (see `saved_width`) if `keep`, and the factor 1 / denominator.

    The gradient by the logits comes from the same trip, times `upstream`: all of it in `grad`, which may be the logits, or a
    sample. On a GPU factor and `upstream` are tensors, there is no sample, and last bits are those of a call with a gradient
    only where there is one, or `as_with_gradient`; on the CPU bits are the same anyway.
    """
    if not logits.is_cpu:
        arguments = (logits, target, weight, bias, options, reduction, denominator, keep, grad, upstream)
        on_gpu: tuple[Tensor, Tensor | None, Tensor] = gpu().cross_entropy(*arguments, as_with_gradient=as_with_gradient)
        return on_gpu
    dim = options.dim
    rows = row_shape(logits.shape, dim) if keep or reduction == NONE else ()
    # The quickest ways to a scalar and to a small tensor: a small loss takes less time than torch.empty does.
    scalar = _SCALAR[logits.dtype]
    loss = torch.empty_like(scalar) if reduction != NONE else torch.empty(rows, dtype=scalar.dtype, device=CPU)
    saved = torch.from_numpy(np.empty((*rows, saved_width(logits, logits.shape[dim])))) if keep else None
    used = _cpu.cross_entropy(
        call_of(logits, target, weight, bias, options),
        reduction,
        denominator,
        loss.data_ptr(),
        address(saved),
        None if grad is None else describe(grad, dim),
        upstream,  # type: ignore[arg-type]  # a float on the CPU
        sampled,
    )
    return loss, saved, 1.0 / used if used else 0.0  # nothing counted: no row has a gradient


def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    scale: float | Tensor,
    options: Options,
    grad: Tensor | None = None,
    expected: tuple[Tensor | None, ...] | None = None,
) -> Tensor:
    """The gradient by the logits, in `grad`, which may be the logits; `expected` is an `ahead.OnGpu` where there is one."""
    if not logits.is_cpu:
        arguments = (upstream, logits, target, weight, bias, saved, scale, options, grad, expected)
        on_gpu: Tensor = gpu().cross_entropy_backward(*arguments)
        return on_gpu
    grad = fresh(logits) if grad is None else grad
    upstream = upstream_of(upstream)
    _cpu.cross_entropy_backward(
        call_of(logits, target, weight, bias, options),
        scale,  # type: ignore[arg-type]  # a float on the CPU
        saved.data_ptr(),
        describe_upstream(upstream),
        describe(grad, options.dim),
    )
    return grad


def soft_target_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    scale: float | Tensor,
    options: Options,
) -> Tensor:
    """The gradient by target probabilities."""
    if not logits.is_cpu:
        on_gpu: Tensor = gpu().soft_target_gradient(upstream, logits, target, weight, bias, saved, scale, options)
        return on_gpu
    out = fresh(target)
    upstream = upstream_of(upstream)
    _cpu.soft_target_gradient(
        call_of(logits, target, weight, bias, options),
        scale,  # type: ignore[arg-type]  # a float on the CPU
        saved.data_ptr(),
        describe_upstream(upstream),
        describe(out, options.dim),
    )
    return out


def statistics(
    logits: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    dim: int,
    softcap: float,
    temperature: float,
    want: Sequence[bool],
) -> list[Tensor]:
    """The eight statistics in the order of LogitStats, empty where not wanted, and `saved`."""
    outputs = stats_outputs(logits, target, dim, want)
    rows = row_shape(logits.shape, dim)
    k = 1 if target is None or target.ndim == len(rows) else target.shape[-1]
    if target is not None:
        target = target.contiguous()
    if not logits.is_cpu:
        gpu().statistics(logits, target, k, bias, dim, softcap, temperature, outputs, want)
        return outputs
    _cpu.statistics(
        describe(logits, dim),
        ids_of(target),
        k,
        (temperature, softcap, address(bias)),
        tuple(out.data_ptr() if wanted else 0 for out, wanted in zip(outputs, want, strict=False)),
        outputs[-1].data_ptr(),
    )
    return outputs


def gradient(
    logits: Tensor,
    saved: Tensor,
    coefficients: Tensor,
    target: Tensor | None,
    target_coefficients: Tensor | None,
    bias: Tensor | None,
    dim: int,
    softcap: float,
    temperature: float,
    inplace: bool = False,
) -> Tensor:
    """p (a + b (z - max) + c p) + d less the target coefficients at their ids, through the transform."""
    grad = logits if inplace else fresh(logits)
    if target is not None:
        target = target.contiguous()
    k = 1 if target is None or target.ndim == saved.ndim - 1 else target.shape[-1]
    saved, coefficients = saved.contiguous(), coefficients.contiguous()
    if target_coefficients is not None:
        target_coefficients = target_coefficients.contiguous()
    if not logits.is_cpu:
        gpu().gradient(logits, saved, coefficients, target, k, target_coefficients, bias, dim, softcap, temperature, grad)
        return grad
    _cpu.gradient(
        describe(logits, dim),
        saved.data_ptr(),
        coefficients.data_ptr(),
        ids_of(target),
        k,
        address(target_coefficients),
        (temperature, softcap, address(bias)),
        describe(grad, dim),
    )
    return grad


def saved_width(like: Tensor, classes: int) -> int:
    """How many numbers a forward keeps of each row: max, rest, mass; on the CPU the maxima of its blocks too."""
    return _cpu.SAVED_FIELDS + (0 if like.is_cuda else -(-classes // _cpu.BLOCK))


def stats_outputs(logits: Tensor, target: Tensor | None, dim: int, want: Sequence[bool]) -> list[Tensor]:
    """Room for the statistics: on logits of any kind, so that tracing sees the same shapes."""
    rows = row_shape(logits.shape, dim)
    outputs = []
    for name, wanted in zip(STATISTICS, want, strict=True):
        shape = tuple(target.shape) if name in TARGET_STATISTICS and target is not None else rows
        dtype = torch.int64 if name in INTEGER_STATISTICS else accumulation_dtype(logits.dtype)
        outputs.append(logits.new_empty(shape if wanted else (0,), dtype=dtype))
    outputs.append(logits.new_empty((*rows, saved_width(logits, logits.shape[dim])), dtype=torch.float64))
    return outputs


def symbol(name: str) -> int:
    """The address of a function of PyTorch's own library, which is loaded; 0 where it has none of this name."""
    for library in Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*"):
        function = getattr(ctypes.CDLL(str(library)), name, None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _use_torch_pool() -> None:
    """Runs our loops on PyTorch's threads (PyTorch 2.10 and later)."""
    parallel_for, threads = symbol("torch_parallel_for"), symbol("torch_get_num_threads")
    if parallel_for and threads:
        _cpu.use_torch_pool(parallel_for, threads)


_use_torch_pool()
