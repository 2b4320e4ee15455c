# SPDX-License-Identifier: Apache-2.0
"""The C++ module. Arguments are positional; pointers are addresses, 0 for "none"; outputs are memory of the caller."""

from typing import TypeAlias

# (address, dtype code, shape, strides in elements, class axis)
Tensor: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], int]
Targets: TypeAlias = tuple[int, int]  # (address, itemsize) of contiguous class ids in the order of the rows
Transform: TypeAlias = tuple[float, float, int]  # (temperature, softcap or 0.0, address of the bias)
# A cross-entropy: logits, ids, probabilities, class weights, transform, ignored id, label smoothing, z-loss.
Call: TypeAlias = tuple[Tensor, Targets | None, Tensor | None, int, Transform, int, float, float]
Upstream: TypeAlias = tuple[int, int, int]  # (address, dtype code, step in elements)

F32: int
F64: int
F16: int
BF16: int
BLOCK: int  # classes of a block
SAVED_FIELDS: int  # numbers that a forward keeps of a row
MOST_THREADS: int

def cross_entropy(
    call: Call,
    reduction: int,
    denominator: float | None,
    loss: int,
    saved: int,
    grad: Tensor | None,
    upstream: float,
    sampled: SampledGradient | None,
    /,
) -> float: ...
def cross_entropy_backward(
    call: Call,
    scale: float,
    saved: int,
    upstream: Upstream,
    grad: Tensor,
    /,
) -> None: ...
def check_targets(target: Targets, shape: tuple[int, ...], classes: int, ignore_index: int | None, /) -> None: ...
def soft_target_gradient(
    call: Call,
    scale: float,
    saved: int,
    upstream: Upstream,
    out: Tensor,
    /,
) -> None: ...
def statistics(
    logits: Tensor,
    target: Targets | None,
    k: int,
    transform: Transform,
    outputs: tuple[int, ...],
    saved: int,
    /,
) -> None: ...
def gradient(
    logits: Tensor,
    saved: int,
    coefficients: int,
    target: Targets | None,
    k: int,
    target_coefficients: int,
    transform: Transform,
    grad: Tensor,
    /,
) -> None: ...

class SampledGradient:
    """Entries of a gradient that `cross_entropy` keeps at random; `token` holds an int64 a row."""

    def __init__(self, seed: int, threshold: float, token: int, /) -> None: ...
    def count(self) -> int: ...
    def collect(self, start: int, columns: int, values: int, wide: bool, /) -> None: ...

def ordered_product(hidden: Tensor, weight: Tensor, bias: int, out: Tensor, /) -> None: ...
def product(left: Tensor, right: Tensor, out: Tensor, /) -> None: ...
def add_product(left: Tensor, right: Tensor, add: bool, out: Tensor, /) -> None: ...
def multiply(rows: int, start: int, ids: int, values: int, matrix: Tensor, out: Tensor, /) -> None: ...
def transpose(
    rows: int,
    start: int,
    ids: int,
    values: int,
    wide: bool,
    columns: int,
    out_start: int,
    out_ids: int,
    out_values: int,
    /,
) -> None: ...
def transposed_product(
    product: tuple[int, int], grad: Tensor, hidden: Tensor, total: int, add: bool, rounded: Tensor | None, /
) -> None: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def use_torch_pool(parallel_for: int, get_num_threads: int, /) -> None: ...
def build_info() -> dict[str, str]: ...
def release_recycled() -> int: ...

class RecycledBlock:
    """Uninitialised memory with the buffer protocol; once freed, it serves the next block of its size."""

    def __init__(self, nbytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
