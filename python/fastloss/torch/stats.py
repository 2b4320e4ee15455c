# SPDX-License-Identifier: Apache-2.0
"""Statistics of rows of logits in tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastloss import _options
from fastloss._options import STATISTICS, LogitStats
from fastloss.torch import ops, plain
from fastloss.torch.arguments import as_class_ids, check_device, check_ids, check_logits, per_class


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

    With the transformed logits z_j = softcap * tanh(x_j / temperature / softcap) + bias_j, p = softmax(z) and
    L = log sum_j exp(z_j)::

        logprob     z_y - L               logsumexp     L
        entropy     L - sum_j p_j z_j     mean_logit    1/V sum_j z_j
        sum_sq_prob sum_j p_j^2           max_prob      max_j p_j
        argmax      of z, the first       rank          classes that a stable descending sort of z puts before y

    All but ``argmax`` and ``rank`` are differentiable, any number of times.

    Args:
        logits: float32, float64, float16 or bfloat16, any strides.
        target: class ids for ``"logprob"`` and ``"rank"``: the shape of the logits without the class dimension, or with K ids a
            row the same with K added at the end.
        dim: the class dimension.
        want: names of the statistics: ``"logprob"``, ``"logsumexp"``, ``"entropy"``, ``"mean_logit"``, ``"sum_sq_prob"``,
            ``"max_prob"``, ``"argmax"``, ``"rank"``. By default logsumexp and entropy, and logprob with a target.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits first, positive.
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

    Source:
        Entropy: Shannon, "A Mathematical Theory of Communication" (1948).
        Sum of squares: a term of Brier, "Verification of forecasts expressed in terms of probability" (1950).
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
        if ids is not None:
            check_ids(ids, logits.shape[class_dim], None)
        outputs = plain.all_statistics(*arguments)
    else:
        outputs = torch.ops.fastloss.statistics(*arguments)
    return LogitStats(**{name: out for name, out in zip(STATISTICS, outputs[:-1], strict=True) if name in names})


def _check_ids(target: Tensor, logits: Tensor, dim: int, name: str) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(target).__name__}")
    check_device(name, target, logits)
    ids = as_class_ids(name, target, "integer class ids")
    _options.ids_per_row(ids.shape, logits.shape, dim, name, "logits")
    return ids


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given ids: the token log-probabilities of preference and RL training.

    With z = logits / temperature: ``z_y - log sum_j exp(z_j)`` for each id y.

    Args:
        logits: shape ``(..., V)``; float32, float64, float16 or bfloat16, any strides.
        index: class ids of any integer dtype, shape ``(...)`` or ``(..., K)``.
        temperature: divides the logits, positive.

    Returns:
        Log-probabilities in the shape of `index`, differentiable: float64 for float64 logits and else float32, for 16-bit
        logits too, where TRL returns the dtype of the logits.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or a temperature that do not fit.
        IndexError: an id out of range. On a GPU its log-probability becomes NaN instead, but with `FASTLOSS_DEBUG=1`.
        NotImplementedError: tensors on other devices than the CPU and, where fastloss was built for it, CUDA.

    Example:
        >>> import torch
        >>> selective_log_softmax(torch.zeros(2, 4), torch.tensor([[0, 3], [1, 2]])).exp()
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])

    Source:
        The function of this name in TRL, `trl.trainer.utils`.
    """
    check_logits("logits", logits, cuda=True)
    ids = _check_ids(index, logits, _options.class_axis(-1, logits.shape, "dim", "logits"), "index")
    ids = ops.in_memory("index", ids)
    try:
        logprob: Tensor = logit_stats(logits, ids, want=("logprob",), temperature=temperature).logprob
    except IndexError as error:  # whose message calls the ids a target
        raise IndexError(str(error).replace("target", "index", 1)) from None
    return logprob


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of softmax(logits), in nats: ``log sum_j exp(x_j) - sum_j p_j x_j``.

    Args:
        logits: shape ``(..., V)``; float32, float64, float16 or bfloat16, any strides.
        chunk_size: taken so that calls written for TRL work as they are; nothing is stored here that would have to be cut.

    Returns:
        Entropies of shape ``(...)``, differentiable: float64 for float64 logits and else float32, for 16-bit logits too, where
        TRL returns the dtype of the logits.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: logits without a class.
        NotImplementedError: tensors on other devices than the CPU and, where fastloss was built for it, CUDA.

    Example:
        >>> import torch
        >>> entropy_from_logits(torch.zeros(2, 4)).exp()
        tensor([4., 4.])

    Source:
        The function of this name in TRL, `trl.trainer.utils`; Shannon, "A Mathematical Theory of Communication" (1948).
    """
    entropy: Tensor = logit_stats(logits, want=("entropy",)).entropy
    return entropy
