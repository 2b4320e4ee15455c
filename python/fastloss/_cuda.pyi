# SPDX-License-Identifier: Apache-2.0
"""The CUDA module, where it was built: as `_cpu`, with pointers of the GPU, and its index and the stream at the end."""

from fastloss._cpu import Call, Targets, Tensor, Transform, Upstream

ARCHITECTURES: str
REDUCTION_BYTES: int  # workspace of reduce_tokens

Places = tuple[int, int, int, int]  # slots of a token; count, columns, values of each

def cross_entropy(
    call: Call,
    reduction: int,
    denominator: float | None,
    loss: int,
    saved: int,
    scale: int,
    grad: Tensor | None,
    upstream: Upstream | None,
    as_with_gradient: bool,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cross_entropy_backward(
    call: Call,
    scale: int,
    saved: int,
    upstream: Upstream,
    expected: tuple[int, int, int],  # the upstream gradient that the gradient was made for, the next one, whether surprised
    grad: Tensor,
    device: int,
    stream: int,
    /,
) -> None: ...
def soft_target_gradient(
    call: Call,
    scale: int,
    saved: int,
    upstream: Upstream,
    out: Tensor,
    device: int,
    stream: int,
    /,
) -> None: ...
def statistics(
    logits: Tensor,
    target: Targets | None,
    k: int,
    transform: Transform,
    outputs: tuple[int, ...],
    saved: int,
    workspace: int,
    device: int,
    stream: int,
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
    device: int,
    stream: int,
    /,
) -> None: ...
def reduce_tokens(
    tokens: int,
    classes: int,
    dtype: int,
    target: Targets | None,
    weight: int,
    ignore_index: int,
    reduction: int,
    denominator: float | None,
    losses: int,
    loss: int,
    scale: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cross_entropy_chunk(
    call: Call,
    scale: int,
    losses: int,
    wide: bool,
    saved: int,
    grad: Tensor | None,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def sample_chunk(
    call: Call,
    saved: int,
    random: tuple[int, float, int],
    places: Places,
    device: int,
    stream: int,
    /,
) -> None: ...
def multiply(
    rows: int,
    places: Places,
    factors: int,
    start: int,
    order: int,
    dtype: int,
    matrix: int,
    width: int,
    out: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def row_sums(
    rows: int, places: Places, factors: int, start: int, order: int, dtype: int, out: int, device: int, stream: int, /
) -> None: ...
def scale(numbers: int, count: int, dtype: int, upstream: Upstream, device: int, stream: int, /) -> None: ...
def device_count() -> int: ...
def workspace_bytes(logits: Tensor, device: int, stream: int, /) -> int: ...
def plan(logits: Tensor, grad: Tensor | None, device: int, stream: int, /) -> tuple[int, int, bool, int]: ...
