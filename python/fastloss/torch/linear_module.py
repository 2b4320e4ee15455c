# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss import _options
from fastloss.torch.arguments import loss_options
from fastloss.torch.linear import linear_cross_entropy
from fastloss.torch.linear_arguments import DEFAULT_IGNORE_INDEX, check_sparse, chunk_size_of


class LinearCrossEntropyLoss(torch.nn.Module):
    """`linear_cross_entropy` as a module that owns its head: `torch.nn.LinearCrossEntropyLoss` and the options of fastloss.

    The names in its state are those of PyTorch's module: ``linear.weight``, ``linear.bias``, ``weight``.

    Args:
        in_features: H, the width of the hidden states.
        num_classes: C.
        out_features: further dimensions ``(d1, ..., dK)`` of the head: one target each.
        bias: whether the head has a bias.
        device: where the head lies.
        dtype: of the head.
        reduction: see `linear_cross_entropy`, as for all that follow.
        weight: class weights, shape ``(C)``; a buffer, as in PyTorch.
        ignore_index: tokens with this id count nothing; None stands for -100.
        label_smoothing: eps in [0, 1].
        options: a `torch.nn.LinearCrossEntropyOptions`.
        z_loss: factor of the squared log-sum-exp.
        softcap: bound of the logits.
        temperature: divides the logits first.
        logit_bias: one number a class, shape ``(C)``; a buffer.
        backward: ``"exact"`` or ``"sampled"``.
        threshold: t in (0, 1], for the sampled backward.
        sparse: row-sparse gradients of the head, for the sampled backward.
        chunk_tokens: tokens whose logits are made at a time.

    A `denominator` and a `seed` may change from call to call: they are given to `forward`, after input and target.

    Raises:
        TypeError: an option has a type that has no meaning here.
        ValueError: an option has a wrong value or shape.

    Example:
        >>> import torch
        >>> criterion = LinearCrossEntropyLoss(16, 1000, backward="sampled")
        >>> criterion(torch.zeros(4, 16), torch.zeros(4, dtype=torch.long)).shape
        torch.Size([])
    """

    weight: Tensor | None
    logit_bias: Tensor | None
    _OPTIONS = (
        "reduction",
        "ignore_index",
        "label_smoothing",
        "options",
        "z_loss",
        "softcap",
        "temperature",
        "backward",
        "threshold",
        "sparse",
        "chunk_tokens",
    )

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        logit_bias: Tensor | None = None,
        backward: str = "exact",
        threshold: float = 1 / 64,
        sparse: bool = False,
        chunk_tokens: int | None = None,
    ) -> None:
        """Takes the size of the head, and the options of `linear_cross_entropy`."""
        super().__init__()
        default = DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index
        loss_options(default, reduction, label_smoothing, z_loss, softcap, temperature, None)
        sampled = _options.backward_code(backward)
        _options.check_flag("sparse", sparse)
        if sparse:
            check_sparse(sampled, out_features)
        chunk_size_of(chunk_tokens, options)
        for name, value in (("weight", weight), ("logit_bias", logit_bias)):
            if value is not None:
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
                _options.check_per_class(value.shape, num_classes, name)
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            if _options.index(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        sizes: Any = out_features
        if not isinstance(sizes, Sequence) or any(_options.index("out_features", size) < 1 for size in sizes):
            raise ValueError(f"out_features must be a tuple of sizes from 1 on, got {sizes!r}")
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.linear = torch.nn.Linear(
            in_features, math.prod(self.out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.register_buffer("weight", weight)
        self.register_buffer("logit_bias", logit_bias, persistent=logit_bias is not None)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.backward = backward
        self.threshold = _options.threshold(threshold)
        self.sparse = sparse
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        denominator: float | Tensor | None = None,
        seed: int | torch.Generator | None = None,
    ) -> Tensor:
        """The loss of these hidden states, see `linear_cross_entropy`."""
        head: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias  # None without a bias, which its type does not say
        if self.out_features:
            head = head.reshape(self.num_classes, *self.out_features, -1)
            bias = bias if bias is None else bias.reshape(head.shape[:-1])
        return linear_cross_entropy(
            input,
            head,
            target,
            linear_bias=bias,
            weight=self.weight,
            logit_bias=self.logit_bias,
            denominator=denominator,
            seed=seed,
            **{name: getattr(self, name) for name in self._OPTIONS},
        )

    def extra_repr(self) -> str:
        """Shows the sizes, and the options that are set."""
        shown = {"in_features": self.linear.in_features, "num_classes": self.num_classes, "out_features": self.out_features}
        options = {name: getattr(self, name) for name in self._OPTIONS}
        shown |= {name: value for name, value in options.items() if value is not None and value is not False}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
