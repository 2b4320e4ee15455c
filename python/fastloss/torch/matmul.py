# SPDX-License-Identifier: Apache-2.0
"""The matrix products of linear cross-entropy.

Logits come from a product of our own, `csrc/ordered.hpp`, whose sums have one order: so a sample is the same for any number of
threads, any chunks and any CPU. In float32 it is as fast as oneDNN's, and faster than any product of PyTorch in float64 and
float16. Where the CPU multiplies bfloat16 itself, PyTorch's product of that is twice as fast, and for many classes has the same
bits for any threads and chunks, too.

The gradients come from the fastest products that PyTorch offers here, found by measurement. In float32 it has two libraries,
a BLAS (MKL on x86) behind `torch.mm` and oneDNN: with AVX-512 its product of small blocks, which `csrc/products.cpp` puts
together, else an operator of PyTorch's compiler. Which of them is faster depends on the maker of the CPU and on the product.
So each product is measured once in a process, at its first use with weights of some size: always on the same number of
tokens, and oneDNN must be clearly faster, so that the choice, and with it the last bits, depends neither on the tokens of a
call nor on noise. With smaller weights oneDNN's blocks are taken where they are to be had. The environment variable
FASTLOSS_MATMUL, `blas` or `onednn`, takes the choice instead. Gradients of 16 bits that the CPU does not multiply itself are
products of float32, a block of classes at a time: PyTorch's own of float16 took 150 times as long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss import _cpu
from fastloss._chunks import BLOCK_BYTES, slices
from fastloss.torch.ops import accumulation_dtype, address, describe, symbol

Product = Callable[..., None]
Blocks = tuple[int, int]  # addresses of oneDNN's product of small blocks, and of what releases the registers that it sets up

# From so many on, the bits of PyTorch's product of bfloat16 depend neither on threads nor on other tokens.
_CLASSES, _FEATURES = 1000, 32
_MEASURED_FROM = 1 << 20  # weights: below, a wrong choice costs less than measuring does
_TOKENS = 256  # of what is measured
_SAMPLE = 1 << 31  # multiplications that one measurement takes at most
_CLEARLY = 0.9  # of the time of BLAS
_choices: dict[str, Product] = {}


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias."""
    (_blas_logits if _logits_by_pytorch(weight) else _own_logits)(hidden, weight, bias, out)


def _logits_by_pytorch(weight: Tensor) -> bool:
    classes, features = weight.shape
    fast = weight.dtype == torch.bfloat16 and torch.bfloat16 in _BLOCKS
    return fast and classes >= _CLASSES and features >= _FEATURES


def hidden_product(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = grad @ weight."""
    if _in_float32(weight.dtype):
        total = torch.zeros(out.shape, dtype=torch.float32, device="cpu")
        part = torch.empty_like(total)
        for classes in slices(weight.shape[0], max(1, BLOCK_BYTES // (4 * weight.shape[1]))):
            _run("hidden", grad[:, classes].float(), weight[classes].float(), part)
            total += part
        out.copy_(total)
    else:
        _run("hidden", grad, weight, out)


def weight_product(grad: Tensor, hidden: Tensor, total: Tensor | None, out: Tensor, *, add: bool, last: bool) -> None:
    """out = grad.T @ hidden, with what was there before if `add`.

    For 16-bit factors the sum is made in `total`, of float32, and goes to `out` if this product is its `last`; None, if it is
    the only one.
    """
    if hidden.dtype in (torch.float32, torch.float64):
        _run("weight", grad, hidden, out, add)
    elif _in_float32(hidden.dtype):
        wide = hidden.float()
        for classes in slices(grad.shape[1], max(1, BLOCK_BYTES // (4 * grad.shape[0]))):
            factor = grad[:, classes].float()
            block = wide.new_empty(factor.shape[1], wide.shape[1]) if total is None else total[classes]
            _run("weight", factor, wide, block, add)
            if last:
                out[classes] = block
    else:
        # PyTorch's own product of bfloat16 would round it to bfloat16.
        _multiply_transposed(_BLOCKS[hidden.dtype], grad, hidden, total, out if last else None, add)


def _in_float32(dtype: torch.dtype) -> bool:
    """Whether gradients of this dtype are products of float32, a block of classes at a time: the CPU does not multiply it."""
    return dtype.itemsize == 2 and dtype not in _BLOCKS


# ---- our own ---------------------------------------------------------------------------------------------------------


def _own_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    sums = accumulation_dtype(weight.dtype)
    wide, start = hidden.to(sums), None if bias is None else bias.to(sums).contiguous()
    _cpu.ordered_product(describe(wide, 1), describe(weight, 1), address(start), describe(out, 1))


# ---- BLAS: torch.mm --------------------------------------------------------------------------------------------------


def _blas_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _blas_hidden(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(grad, weight, out=out)


def _blas_weight(grad: Tensor, hidden: Tensor, total: Tensor, add: bool) -> None:
    if add:
        total.addmm_(grad.t(), hidden)
    else:
        torch.mm(grad.t(), hidden, out=total)


# ---- oneDNN without small blocks: its operator allocates what it returns ----------------------------------------------


def _onednn_hidden(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], ""))


# ---- oneDNN's product of small blocks: results go where they belong, sums stay there in float32 --------------------------


def _blocks_hidden(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    _cpu.hidden_product(_BLOCKS[torch.float32], describe(grad, 1), describe(weight, 1), describe(out, 1))


def _blocks_weight(grad: Tensor, hidden: Tensor, total: Tensor, add: bool) -> None:
    _multiply_transposed(_BLOCKS[torch.float32], grad, hidden, total, None, add)


def _multiply_transposed(
    blocks: Blocks, grad: Tensor, hidden: Tensor, total: Tensor | None, rounded: Tensor | None, add: bool
) -> None:
    to = None if rounded is None else describe(rounded, 1)
    _cpu.transposed_product(blocks, describe(grad, 1), describe(hidden, 1), address(total), add, to)


def _find_blocks() -> dict[torch.dtype, Blocks]:
    """Where brgemm is, part of the C++ interface of PyTorch, by dtype, as far as it is there and fast.

    It is found by name in the library that is loaded, and tried before it is used.
    """
    release = symbol("_ZN2at6native7cpublas14brgemm_releaseEb")
    found = {}
    for dtype, mangled, fast in (
        (torch.float32, "PKfS3_", ["_is_avx512_supported"]),
        (torch.bfloat16, "PKN3c108BFloat16ES5_", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"]),
    ):
        blocks = symbol(f"_ZN2at6native7cpublas6brgemmEllllllb{mangled}Pfb"), release
        if not all(blocks) or not any(getattr(torch.cpu, name, lambda: False)() for name in fast):
            continue
        ones, total = torch.ones((4, 8), dtype=dtype, device="cpu"), torch.ones((8, 8), device="cpu")
        try:
            _cpu.transposed_product(blocks, describe(ones, 1), describe(ones, 1), total.data_ptr(), True, None)
        except RuntimeError:  # this build of PyTorch or this CPU has no kernel for it
            continue
        if bool((total == 5).all()):
            found[dtype] = blocks
    return found


def _products(blocks: bool) -> dict[str, dict[str, Product]]:
    """Of float32, by role and library."""
    return {
        "hidden": {"blas": _blas_hidden, "onednn": _blocks_hidden if blocks else _onednn_hidden},
        "weight": {"blas": _blas_weight, "onednn": _blocks_weight if blocks else _blas_weight},
    }


_BLOCKS = _find_blocks()
_PRODUCTS = _products(torch.float32 in _BLOCKS)


# ---- the choice ------------------------------------------------------------------------------------------------------


def _pinned() -> str | None:
    name = os.environ.get("FASTLOSS_MATMUL")
    if not name:
        return None
    if name not in ("blas", "onednn"):
        raise ValueError(f"FASTLOSS_MATMUL = {name!r} is not a known library: expected blas or onednn")
    return name


_PINNED = _pinned()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _run(role: str, first: Tensor, second: Tensor, *rest: Any) -> None:
    products = _PRODUCTS[role]
    if first.dtype != torch.float32 or not _has_onednn():
        products["blas"](first, second, *rest)  # there is no choice
        return
    if _PINNED is not None:
        products[_PINNED](first, second, *rest)
        return
    classes = first.shape[1] if role == "weight" else second.shape[0]
    if role not in _choices and classes * second.shape[1] >= _MEASURED_FROM:
        _choices[role] = _fastest(role, classes, second.shape[1])
    _choices.get(role, products["onednn" if torch.float32 in _BLOCKS else "blas"])(first, second, *rest)


def _fastest(role: str, classes: int, width: int) -> Product:
    """Times each library on some tokens and some of the classes."""
    classes = min(classes, max(64, _SAMPLE // (_TOKENS * width)))
    shapes = (_TOKENS, width), (classes, width), (_TOKENS, classes)
    hidden, weight, grad = (torch.ones(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    arguments: tuple[Any, ...] = (grad, weight, hidden) if role == "hidden" else (grad, hidden, weight, False)

    def seconds(product: Product) -> float:
        product(*arguments)
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            product(*arguments)
            best = min(best, time.perf_counter() - start)
        return best

    blas, onednn = _PRODUCTS[role]["blas"], _PRODUCTS[role]["onednn"]
    return onednn if seconds(onednn) < _CLEARLY * seconds(blas) else blas
