# SPDX-License-Identifier: Apache-2.0
"""Statistics of rows of logits in tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastloss import _options
from fastloss._options import STATISTICS, LogitStats
from fastloss.torch import ops, plain
from fastloss.torch.arguments import as_class_ids, check_device, check_logits, per_class


def logit_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    dim: int = -1,
    want: str | Iterable[str] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
) -> LogitStats:
    """Statistics of each row of logits, all of them from one pass, with gradients through one more.

    They are those of the transformed logits z_j = softcap * tanh(x_j / temperature / softcap) + bias_j. What each one is stands
    at :class:`fastloss.LogitStats`. All but ``argmax`` and ``rank`` are differentiable, any number of times.

    Args:
        logits: float32, float64, float16 or bfloat16, any strides.
        target: class ids for ``"logprob"`` and ``"rank"``: the shape of the logits without the class dimension, or with K ids a
            row the same with K added at the end.
        dim: the class dimension.
        want: names of the statistics: ``"logprob"``, ``"logsumexp"``, ``"entropy"``, ``"mean_logit"``, ``"sum_sq_prob"``,
            ``"max_prob"``, ``"argmax"``, ``"rank"``. By default logsumexp and entropy, and logprob with a target.
        softcap: bound of the logits.
        temperature: divides the logits first.
        bias: one number a class, added last, shape ``(C)``; a constant.

    Returns:
        A :class:`fastloss.LogitStats` with the wanted fields set: float64 for float64 logits, else float32; ``argmax`` and
        ``rank`` int64.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes, names or options that do not fit.
        IndexError: a class id out of range. On a GPU its row becomes NaN instead, but with `FASTLOSS_DEBUG=1`.
        NotImplementedError: tensors on other devices than the CPU and, where fastloss was built for it, CUDA.

    Example:
        >>> import torch
        >>> stats = logit_stats(torch.zeros(2, 8), torch.tensor([3, 5]), want=("logprob", "entropy"))
        >>> print(stats.logprob.exp(), stats.entropy.exp())
        tensor([0.1250, 0.1250]) tensor([8., 8.])
    """
    check_logits("logits", logits, cuda=True)
    class_dim = _options.class_axis(dim, logits.shape, "dim", "logits")
    heat, cap = _options.transform_options(temperature, softcap)
    names = _options.wanted_statistics(want, target is not None)
    ids = None if target is None else _check_ids(target, logits, class_dim, "target")
    if bias is not None:
        bias = per_class("bias", bias, logits, class_dim)
    # The gradient of max_prob needs the class that holds it.
    wanted = tuple(name in names or (name == "argmax" and "max_prob" in names) for name in STATISTICS)

    arguments = (logits, ids, bias, class_dim, cap, heat, wanted)
    outputs: Sequence[Tensor]
    if ops.eager(logits, ids, bias) and not (torch.is_grad_enabled() and logits.requires_grad):
        outputs = ops.statistics(*arguments)
    elif ops.forward_mode():
        outputs = plain.all_statistics(*arguments)
    else:
        outputs = torch.ops.fastloss.statistics(*arguments)
    return LogitStats(**{name: out for name, out in zip(STATISTICS, outputs, strict=False) if name in names})


def _check_ids(target: Tensor, logits: Tensor, dim: int, name: str) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(target).__name__}")
    check_device(name, target, logits)
    _options.ids_per_row(target.shape, logits.shape, dim, name, "logits")
    if target.dtype.is_floating_point:
        raise TypeError(f"{name} must hold integer class ids, got {str(target.dtype).removeprefix('torch.')}")
    return as_class_ids(target)


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given ids: the token log-probabilities of preference and RL training.

    Args:
        logits: shape ``(..., V)``.
        index: class ids, shape ``(...)`` or ``(..., K)``.
        temperature: divides the logits.

    Returns:
        Log-probabilities in the shape of `index`, float32 (float64 for float64 logits), differentiable.

    Example:
        >>> import torch
        >>> selective_log_softmax(torch.zeros(2, 4), torch.tensor([[0, 3], [1, 2]])).exp()
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    check_logits("logits", logits, cuda=True)
    _check_ids(index, logits, logits.ndim - 1, "index")
    logprob: Tensor = logit_stats(logits, index, want=("logprob",), temperature=temperature).logprob
    return logprob


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of softmax(logits), in nats.

    Args:
        logits: shape ``(..., V)``.
        chunk_size: taken so that calls written for TRL work as they are; nothing is stored here that would have to be cut.

    Returns:
        Entropies of shape ``(...)``, float32 (float64 for float64 logits), differentiable.

    Example:
        >>> import torch
        >>> entropy_from_logits(torch.zeros(2, 4)).exp()
        tensor([4., 4.])
    """
    entropy: Tensor = logit_stats(logits, want=("entropy",)).entropy
    return entropy
