# SPDX-License-Identifier: Apache-2.0
"""The matrix products of linear cross-entropy.

They are our own, `csrc/ordered.hpp`: each of their sums has one order, so that logits, samples and exact gradients are the same
for any number of threads, any chunks and any CPU. On the CPU of our benchmarks they are as fast as oneDNN's in float32, and
faster than any product of PyTorch in float64 and float16. Where the CPU multiplies bfloat16 itself, PyTorch's products of that
are twice as fast: `torch.mm`, which for many classes has the same bits for any threads and chunks, too; and for the gradient by
the weights, which `torch.mm` would round to bfloat16 with each chunk, oneDNN's small blocks, which `csrc/products.cpp` puts
together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import _cpu
from fastloss._chunks import slices
from fastloss.torch.ops import accumulation_dtype, address, describe, symbol

Blocks = tuple[int, int]  # addresses of oneDNN's product of small blocks, and of what releases the registers that it sets up

# From so many on, the bits of PyTorch's product of bfloat16 depend neither on threads nor on other tokens.
_CLASSES, _FEATURES = 1000, 32
_BLOCK_BYTES = 1 << 24  # of float32 sums that are rounded to 16 bits next: they should still be in the cache


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias."""
    classes, features = weight.shape
    if _blocks_of(weight.dtype) is None or classes < _CLASSES or features < _FEATURES:
        sums = accumulation_dtype(weight.dtype)
        wide, start = hidden.to(sums), None if bias is None else bias.to(sums).contiguous()
        _cpu.ordered_product(describe(wide, 1), describe(weight, 1), address(start), describe(out, 1))
    elif bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def hidden_product(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = grad @ weight."""
    if _blocks_of(weight.dtype) is not None:
        torch.mm(grad, weight, out=out)
        return
    sums = accumulation_dtype(out.dtype)
    total = out if sums == out.dtype else torch.empty(out.shape, dtype=sums, device="cpu")
    _cpu.product(describe(grad, 1), describe(weight, 1), describe(total, 1))
    if total is not out:
        out.copy_(total)


def weight_product(grad: Tensor, hidden: Tensor, total: Tensor | None, out: Tensor, *, add: bool, last: bool) -> None:
    """out = grad.T @ hidden, with what was there before if `add`.

    For 16-bit factors the sum is made in `total`, of float32, and goes to `out` if this product is its `last`; None, if it is
    the only one.
    """
    blocks = _blocks_of(hidden.dtype)
    if hidden.dtype in (torch.float32, torch.float64):
        _add_product(grad.t(), hidden, out, add=add)
    elif blocks is not None:
        to = describe(out, 1) if last else None
        _cpu.transposed_product(blocks, describe(grad, 1), describe(hidden, 1), address(total), add, to)
    else:
        for classes in slices(grad.shape[1], max(1, _BLOCK_BYTES // (4 * hidden.shape[1]))):
            factor = grad[:, classes].t()
            block = torch.empty_like(out[classes], dtype=torch.float32) if total is None else total[classes]
            _add_product(factor, hidden, block, add=add)
            if last:
                out[classes] = block


def add_rows(grad: Tensor, total: Tensor) -> None:
    """total += grad.sum(0), in the order of the tokens."""
    _add_product(torch.ones((1, len(grad)), dtype=total.dtype, device="cpu"), grad, total[None], add=True)


def _add_product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    _cpu.add_product(describe(left, 1), describe(right, 1), add, describe(out, 1))


def _blocks_of(dtype: torch.dtype) -> Blocks | None:
    """The small blocks of a dtype that PyTorch multiplies; None where we do."""
    return _BLOCKS if dtype == torch.bfloat16 else None


def _find_blocks() -> Blocks | None:
    """Where brgemm of bfloat16 is, part of the C++ interface of PyTorch; None where the CPU does not multiply bfloat16 itself.

    It is found by name in the library that is loaded, and tried before it is used.
    """
    names = ("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "_ZN2at6native7cpublas14brgemm_releaseEb")
    blocks = symbol(names[0]), symbol(names[1])
    fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not all(blocks) or not any(getattr(torch.cpu, name, lambda: False)() for name in fast):
        return None
    ones, total = torch.ones((4, 8), dtype=torch.bfloat16, device="cpu"), torch.ones((8, 8), device="cpu")
    try:
        _cpu.transposed_product(blocks, describe(ones, 1), describe(ones, 1), total.data_ptr(), True, None)
    except RuntimeError:  # this build of PyTorch or this CPU has no kernel for it
        return None
    return blocks if bool((total == 5).all()) else None


_BLOCKS = _find_blocks()
