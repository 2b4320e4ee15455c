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
from fastloss.torch import ops
from fastloss.torch.arguments import as_class_ids, check_device, check_logits
from fastloss.torch.ops import CODES


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
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{names[1]} must have as many features as {names[0]}, {hidden.shape[-1]}, at its end; got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{names[1]} must have at least one class, got shape {tuple(weight.shape)}")
    if weight.ndim > 2 and hidden.ndim != 2:
        raise ValueError(f"{names[0]} must have shape (N, H) for {names[1]} of shape {tuple(weight.shape)}")
    tensors = {names[1]: weight}
    if bias is not None:
        check_logits(names[2], bias, cuda=True)
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"{names[2]} must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
        tensors[names[2]] = bias
    for name, tensor in tensors.items():
        check_device(name, tensor, hidden)
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(device_type(hidden)):
            kind, wanted = (str(t.dtype).removeprefix("torch.") for t in (tensor, hidden))
            raise TypeError(f"{name} must have the dtype of {names[0]}, {wanted}, got {kind}")


def check_sparse(sampled: bool, places: Sequence[int]) -> None:
    """Whether the gradient of a head can be row-sparse."""
    if not sampled:
        raise ValueError("sparse=True is for backward='sampled': an exact gradient has an entry in every row")
    if places:
        raise ValueError(f"sparse=True takes a weight of shape (C, H), got one with further dimensions {tuple(places)}")


def check_sparse_factors(hidden: Tensor, weight: Tensor) -> None:
    """Whether nothing stands between the sparse gradient and the weight that it is for."""
    if not ops.eager(hidden, weight):
        raise NotImplementedError("sparse=True is for plain tensors, not torch.compile or torch.func: pass sparse=False")
    device = device_type(weight)
    if torch.is_autocast_enabled(device) and weight.dtype != torch.get_autocast_dtype(device):
        kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, torch.get_autocast_dtype(device)))
        raise TypeError(f"linear_weight must have the dtype of autocast, {wanted}, for sparse=True, got {kind}")


def check_target(input: Tensor, target: Tensor, logits_shape: tuple[int, ...], ignore_index: int | None) -> Tensor:
    """Class ids, or probabilities, one a token."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    check_device("target", target, input)
    if target.dtype in CODES:
        _options.check_probabilities_shape(target.shape, logits_shape, "the logits")
        if ignore_index is not None:
            raise ValueError("ignore_index has no meaning for target probabilities")
        return target
    ids = as_class_ids(target)
    _options.check_ids_shape(ids.shape, logits_shape, len(logits_shape) - 1, "the logits")
    return ids


def check_statistics_ids(target: Tensor, hidden: Tensor, classes: int) -> Tensor:
    """Class ids, one a token or K, as a vector or a matrix."""
    rows = hidden.shape[:-1]
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    check_device("target", target, hidden)
    if target.dtype.is_floating_point:
        raise TypeError(f"target must hold integer class ids, got {str(target.dtype).removeprefix('torch.')}")
    _options.ids_per_row(target.shape, (*rows, classes), len(rows), "target", "the logits")
    many = target.ndim > len(rows)
    return as_class_ids(target).reshape((math.prod(rows), target.shape[-1]) if many else (math.prod(rows),))


def seed_tensor(seed: object, device: torch.device) -> Tensor:
    """A number of 64 bits, drawn where none is given: where it is used, so that a CUDA graph draws at each replay."""
    if isinstance(seed, torch.Generator) and seed.device.type != device.type:
        seed = int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    if seed is None or isinstance(seed, torch.Generator):
        return torch.randint(2**63 - 1, (), generator=seed, device=device)
    return torch.full((), _options.seed(seed), dtype=torch.int64, device=device)


def chunk_size_of(chunk_tokens: int | None, options: Any) -> int | None:
    """Tokens of a chunk, None for the default."""
    if chunk_tokens is not None:
        return check_chunk_tokens(chunk_tokens)
    size = getattr(options, "batch_chunk_size", None)
    return size if isinstance(size, int) and size > 0 else None


def device_type(tensor: Tensor) -> str:
    """As autocast takes it."""
    return "cuda" if tensor.is_cuda else "cpu"


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the factors of a linear map."""
    device = device_type(hidden)
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def split_places(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Weights (C, d1, ..., dK, H) hold a head for each place (d1, ..., dK): the arguments of each.

    A mean over all of them becomes a sum over each, divided by what all count.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    classes, *places = linear_weight.shape[:-1]
    tokens, count = input.shape[0], math.prod(places)
    probabilities = target.dtype in CODES
    wanted = (tokens, classes, *places) if probabilities else (tokens, *places)
    if tuple(target.shape) != wanted:
        of_weight = f"linear_weight of shape {tuple(linear_weight.shape)}"
        raise ValueError(f"target must have shape {wanted} for {of_weight}, got {tuple(target.shape)}")
    heads = linear_weight.reshape(classes, count, -1).unbind(1)
    biases = [None] * count if linear_bias is None else linear_bias.reshape(classes, count).unbind(1)
    targets = target.flatten(2).unbind(2) if probabilities else target.flatten(1).unbind(1)
    if options["reduction"] == "mean" and options["denominator"] is None:
        counted = _counted(target, options["weight"], options["ignore_index"], tokens * count)
        options = options | {"denominator": counted}
    return [
        options | {"input": input, "linear_weight": head, "target": ids, "linear_bias": bias}
        for head, ids, bias in zip(heads, targets, biases, strict=True)
    ]


def _counted(target: Tensor, weight: Tensor | None, ignore_index: int | None, everything: int) -> Tensor:
    if target.dtype in CODES:
        return torch.tensor(float(everything), dtype=torch.float64)
    counts = target != (-100 if ignore_index is None else ignore_index)
    if weight is None:
        return counts.sum().to(torch.float64)
    return weight.to(torch.float64)[torch.where(counts, target, 0).long()].mul(counts).sum()
