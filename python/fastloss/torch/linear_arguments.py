# SPDX-License-Identifier: Apache-2.0
"""What may be passed to the linear losses: hidden states, a head, targets and options, and the words when they do not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss import _options
from fastloss._chunks import check_chunk_tokens
from fastloss.torch import linear_ops, ops
from fastloss.torch.arguments import as_class_ids, check_device, check_ids, check_logits
from fastloss.torch.ops import CODES

DEFAULT_IGNORE_INDEX = -100


def check_factors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> None:
    """Hidden states (..., H), weight (C, H) or with further dimensions, and bias, of one dtype unless autocast makes it so."""
    check_logits(names[0], hidden, cuda=True)
    check_logits(names[1], weight, cuda=True)
    if hidden.ndim < 1:
        raise ValueError(f"{names[0]} must have shape (..., H), got a 0-dimensional tensor")
    if weight.ndim < 2:
        raise ValueError(f"{names[1]} must have shape (C, H), got {tuple(weight.shape)}")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{names[0]} must have at least one feature, got shape {tuple(hidden.shape)}")
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{names[1]} must have as many features as {names[0]}, {hidden.shape[-1]}, at its end; got {tuple(weight.shape)}"
        )
    if 0 in weight.shape[:-1]:
        missing = "class" if weight.shape[0] == 0 else "place"
        raise ValueError(f"{names[1]} must have at least one {missing}, got shape {tuple(weight.shape)}")
    if weight.ndim > 2 and hidden.ndim != 2:
        raise ValueError(f"{names[0]} must have shape (N, H) for {names[1]} of shape {tuple(weight.shape)}")
    tensors = {names[1]: weight}
    if bias is not None:
        check_logits(names[2], bias, cuda=True)
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"{names[2]} must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
        tensors[names[2]] = bias
    ops.in_memory(names[0], hidden)
    for name, tensor in tensors.items():
        ops.in_memory(name, tensor)
        check_device(name, tensor, hidden)
        cast = torch.is_autocast_enabled(device_type(hidden)) and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not cast:
            kind, wanted = (str(t.dtype).removeprefix("torch.") for t in (tensor, hidden))
            raise TypeError(f"{name} must have the dtype of {names[0]}, {wanted}, got {kind}")


def check_sparse(sampled: bool, places: Sequence[int]) -> None:
    """Whether the gradient of a head can be row-sparse."""
    if not sampled:
        raise ValueError("sparse=True is for backward='sampled': an exact gradient has an entry in every row")
    if places:
        raise ValueError(f"sparse=True takes a weight of shape (C, H), got one with further dimensions {tuple(places)}")


def check_sparse_factors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Whether nothing stands between the sparse gradients and the weight and bias that they are for."""
    if not ops.eager(hidden, weight, bias):
        raise NotImplementedError("sparse=True is for plain tensors, not torch.compile or torch.func: pass sparse=False")
    device, cast = device_type(hidden), weight.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        cast = torch.get_autocast_dtype(device)
    for name, factor in (("linear_weight", weight), ("linear_bias", bias)):
        if factor is not None and factor.dtype != cast:
            kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (factor.dtype, cast))
            raise TypeError(f"{name} must have the dtype of autocast, {wanted}, for sparse=True, got {kind}")


def check_target(
    input: Tensor, target: Tensor, logits_shape: tuple[int, ...], class_dim: int, ignore_index: int | None
) -> Tensor:
    """Class ids, contiguous, or probabilities, for logits of this shape."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    check_device("target", target, input)
    if target.dtype in CODES:
        if target.layout is not torch.strided:
            raise TypeError(f"target must be a dense tensor, got {target.layout}")
        ops.in_memory("target", target)
        _options.check_probabilities_shape(target.shape, logits_shape, "the logits")
        if ignore_index is not None:
            raise ValueError(f"ignore_index has no meaning for target probabilities, got ignore_index={ignore_index}")
        return target
    ids = ops.in_memory("target", as_class_ids("target", target))
    _options.check_ids_shape(ids.shape, logits_shape, class_dim, None, "the logits")
    _check_ids(ids, logits_shape[class_dim], DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index)
    return ids


def check_statistics_ids(target: Tensor, hidden: Tensor, classes: int) -> Tensor:
    """Class ids, one a token or K, as a vector or a matrix."""
    rows = hidden.shape[:-1]
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    check_device("target", target, hidden)
    ids = ops.in_memory("target", as_class_ids("target", target, "integer class ids"))
    _options.ids_per_row(ids.shape, (*rows, classes), len(rows), "target", "the logits")
    _check_ids(ids, classes, None)
    tokens = math.prod(rows)
    return ids.reshape((tokens, ids.shape[-1]) if ids.ndim > len(rows) else (tokens,))


def _check_ids(ids: Tensor, classes: int, ignore_index: int | None) -> None:
    """Before a product is made of what they belong to; and in forward mode, where no kernel will look at them."""
    if ops.eager(ids):
        linear_ops.check_ids(ids, classes, ignore_index)
    elif ops.forward_mode():
        check_ids(ids, classes, ignore_index)


def check_seed(seed: object) -> int | torch.Generator | None:
    """A number of 64 bits, a generator that will draw one, or None for PyTorch's."""
    return seed if seed is None or isinstance(seed, torch.Generator) else _options.seed(seed)


def seed_tensor(seed: int | torch.Generator | None, device: torch.device) -> Tensor:
    """A number of 64 bits, drawn where none is given: where it is used, so that a CUDA graph draws at each replay."""
    if isinstance(seed, torch.Generator) and seed.device.type != device.type:
        seed = int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    if seed is None or isinstance(seed, torch.Generator):
        return torch.randint(2**63 - 1, (), generator=seed, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def chunk_size_of(chunk_tokens: int | None, options: Any) -> int | None:
    """Tokens of a chunk, None for the default."""
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options must be a torch.nn.LinearCrossEntropyOptions, got {type(options).__name__}")
    if chunk_tokens is None and options is not None:
        chunk_tokens = options.batch_chunk_size
    return None if chunk_tokens is None else check_chunk_tokens(chunk_tokens)


def device_type(tensor: Tensor) -> str:
    """As autocast takes it."""
    return "cuda" if tensor.is_cuda else "cpu"


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the factors of a linear map: it leaves those of float64 alone."""
    device = device_type(hidden)
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def split_places(weight: Tensor, bias: Tensor | None, target: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Weights (C, d1, ..., dK, H) hold a head for each place (d1, ..., dK): weight, bias and target of each."""
    classes, *places = weight.shape[:-1]
    if not places:
        return [(weight, bias, target)]
    count = math.prod(places)
    biases = [None] * count if bias is None else bias.reshape(classes, count).unbind(1)
    targets = target.flatten(2).unbind(2) if target.dtype in CODES else target.flatten(1).t().contiguous().unbind(0)
    return list(zip(weight.flatten(1, -2).unbind(1), biases, targets, strict=True))


def counted(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over all places divides by: the number of targets that count, or the sum of their weights."""
    if target.dtype in CODES:
        return target.new_full((), target.numel() / target.shape[1], dtype=torch.float64)
    counts = target != ignore_index
    if weight is None:
        return counts.sum().to(torch.float64)
    of_ids = weight.to(torch.float64)[target.long().clamp(0, len(weight) - 1)]  # a GPU must not meet an id out of range
    return of_ids.mul(counts).sum()
