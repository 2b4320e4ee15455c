# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastloss import _options
from fastloss.torch import ops, plain
from fastloss.torch.arguments import (
    check_ids,
    check_logits,
    check_rows_target,
    divided,
    divides_afterwards,
    legacy_reduction,
    loss_options,
    per_class,
)
from fastloss.torch.autograd import CrossEntropyOverLogits, apply_cross_entropy
from fastloss.torch.ops import Options


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    inplace: bool | str = False,
) -> Tensor:
    """Cross-entropy between logits and class ids or probabilities: `torch.nn.functional.cross_entropy`, and more.

    With the transformed logits z_j = softcap * tanh(x_j / temperature / softcap) + logit_bias_j, L = log sum_j exp(z_j), V
    classes, class weights w and label smoothing eps, the loss of a row is

    - class id y: ``w_y * ((1 - eps) * (L - z_y) + z_loss * L**2) + eps / V * sum_j w_j * (L - z_j)``,
    - probabilities q: ``sum_j w_j * ((1 - eps) * q_j + eps / V) * (L - z_j) + z_loss * L**2``.

    Forward reads the logits once and keeps a few numbers a row. A reduced loss makes the gradient in the same trip, in memory
    of its own, times the upstream gradient that the last backward on the device brought (1 at first). Where backward brings
    another one, and where forward made no gradient (``"none"``, under `torch.compile`, `torch.func`, checkpointing
    or offloading, while another loss waits for its backward, after an upstream gradient that was new or never came), backward
    reads the logits once more and writes the gradient: the same bits. Under `torch.compile` and `torch.func`, and with a weight
    that needs a gradient, `inplace` has no effect.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, or any shape with `dim`; float32, float64, float16 or
            bfloat16, any strides.
        target: class ids, of any integer dtype, in the shape of the logits without the class dimension; or probabilities in
            the shape of the logits, which may need gradients.
        weight: class weights, shape ``(C)``. With probabilities it may need a gradient, which goes through a plain PyTorch
            formula: right, and slower; with class ids it is a constant.
        size_average: deprecated by PyTorch, see `reduction`.
        ignore_index: rows with this id count nothing and get a zero gradient. Not for probabilities, unless negative.
        reduce: deprecated by PyTorch, see `reduction`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the weights of the counted rows, or by the number of
            rows for probabilities.
        label_smoothing: eps in [0, 1]; it and the numbers below may be 0-d tensors, whose values are read.
        dim: the class dimension. None is PyTorch's convention: 1, or 0 for 1-D logits. Use -1 for ``[batch, time, vocab]``.
        z_loss: factor of the squared log-sum-exp, at least 0.
        softcap: bound of the logits, positive; None for none.
        temperature: divides the logits first, positive.
        logit_bias: one number a class, added last (logit adjustment), shape ``(C)``; a constant.
        denominator: positive number or 0-d tensor that divides the sum in place of the counted weights: the tokens of a whole
            accumulation window, say. A batch with every target ignored then gives 0, on the graph, and not NaN.
        inplace: True: the gradient goes over the logits, so that no second tensor of their size is made, and in the trip of
            the loss: take the logits as gone once the call has returned. Backward multiplies their gradient in place, and so
            rounds it once more, where another upstream gradient comes than was expected: on the CPU that of the last loss, on
            a GPU 1. ``"backward"``: backward reads the logits once more and writes the gradient over them, which are whole
            until then. So it does for True, too, with float16 (a gradient that waits for its loss scale may vanish), with
            ``"none"``, and with probabilities that need a gradient. Autograd reports the logits that another operation saved.

    Returns:
        The loss: float64 for float64 logits and else float32; a scalar, or the shape of the class ids for ``"none"``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or options that do not fit, `inplace` on a leaf that needs a gradient.
        IndexError: a class id out of range. On a GPU its row becomes NaN instead, but with `FASTLOSS_DEBUG=1`.
        NotImplementedError: tensors on other devices than the CPU and, where fastloss was built for it, CUDA.
        RuntimeError: a second derivative (``create_graph=True``) of a loss with `inplace`, in backward.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", tuple(logits.grad.shape))
        1.6672 (2, 3)

    Source:
        Label smoothing: Szegedy et al., "Rethinking the Inception Architecture" (2016).
        z-loss: Chowdhery et al., "PaLM" (2022).
        Softcap: Gemma Team, "Gemma 2" (2024).
        Logit bias: Menon et al., "Long-tail learning via logit adjustment" (2021).
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if inplace is not False:
        _check_word(inplace)
    check_logits("input", input, cuda=True)
    class_dim = _options.class_axis(dim, input.shape, "dim", "input")
    target = check_rows_target(input, target, class_dim, ignore_index)
    if weight is not None:
        weight = per_class("weight", weight, input, class_dim, constant=target.dtype not in ops.CODES)
    if logit_bias is not None:
        logit_bias = per_class("logit_bias", logit_bias, input, class_dim)
    divisor: float | Tensor | None = None
    if denominator is not None and divides_afterwards(denominator, reduction, input):
        divisor, denominator, reduction = denominator, None, "sum"
    choices: tuple[Any, ...] = (class_dim, ignore_index, label_smoothing, z_loss, softcap, temperature, reduction, denominator)
    eager = ops.eager(input, target, weight, logit_bias) and not (weight is not None and weight.requires_grad)
    options = _remembered_options(*choices) if eager else _check_options(*choices)
    arguments = (input, target, weight, logit_bias, *options)

    loss: Tensor
    if eager and not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        loss = ops.cross_entropy(*arguments, False)[0]
    elif eager:
        if inplace:
            _check_memory(input, inplace)
        at_once = inplace is True and reduction != "none" and input.dtype != torch.float16 and not target.requires_grad
        loss = CrossEntropyOverLogits.apply(*arguments) if at_once else apply_cross_entropy(*arguments, bool(inplace))
    elif ops.forward_mode():
        check_ids(target, input.shape[class_dim], options[0].ignore_index)
        loss = plain.cross_entropy(*arguments)
    else:
        loss = torch.ops.fastloss.cross_entropy(*arguments[:4], *options[0], *options[1:])[0]
    return loss if divisor is None else divided(loss, divisor)


def _check_options(
    dim: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    reduction: str,
    denominator: float | None,
) -> tuple[Options, int, float | None]:
    checked = loss_options(ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, denominator)
    options = Options(dim, checked.ignore_index, checked.label_smoothing, checked.z_loss, checked.softcap, checked.temperature)
    return options, checked.reduction, checked.denominator


# A training loop passes the same few options on every call: looking them up costs less than checking them.
@functools.lru_cache(maxsize=256, typed=True)
def _look_up_options(*choices: Any) -> tuple[Options, int, float | None]:
    if any(isinstance(choice, Tensor) for choice in choices):
        raise TypeError("a tensor may change its value")
    return _check_options(*choices)


def _remembered_options(*choices: Any) -> tuple[Options, int, float | None]:
    try:
        return _look_up_options(*choices)
    except TypeError:  # a tensor, or something that cannot be hashed: the check itself names the argument
        return _check_options(*choices)


def _check_word(inplace: object) -> None:
    if not (isinstance(inplace, bool) or (isinstance(inplace, str) and inplace == "backward")):
        raise ValueError(f'inplace must be False, True or "backward", got {inplace!r}')


def _check_memory(input: Tensor, inplace: bool | str) -> None:
    base = input._base
    if input.requires_grad and (input.is_leaf or (base is not None and base.is_leaf and base.requires_grad)):
        raise ValueError(
            f"inplace={inplace!r} needs logits that are no leaf: this leaf needs a gradient, which would overwrite it"
        )
    if input.numel() == 0:
        return
    reach = 0  # of the dimensions so far, the shortest strides first
    for stride, size in sorted((stride, size) for stride, size in zip(input.stride(), input.shape, strict=True) if size > 1):
        if stride <= reach:
            raise ValueError(
                f"inplace={inplace!r} needs logits of their own: several elements of these may share one place in memory"
            )
        reach += stride * (size - 1)


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy` as a module: `torch.nn.CrossEntropyLoss` with the same options, and those of fastloss.

    Args:
        weight: class weights, shape ``(C)``; a buffer, as in PyTorch.
        size_average: deprecated by PyTorch, see `reduction`.
        ignore_index: see `cross_entropy`, as for all that follow.
        reduce: deprecated by PyTorch, see `reduction`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: eps in [0, 1].
        dim: the class dimension.
        z_loss: factor of the squared log-sum-exp.
        softcap: bound of the logits.
        temperature: divides the logits first.
        logit_bias: one number a class, shape ``(C)``; a buffer.
        inplace: True or ``"backward"``: the gradient goes over the logits.

    A `denominator` may change from call to call: it is given to `forward`, after input and target.

    Example:
        >>> import torch
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    weight: Tensor | None
    logit_bias: Tensor | None
    _OPTIONS = ("ignore_index", "reduction", "label_smoothing", "dim", "z_loss", "softcap", "temperature", "inplace")

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        logit_bias: Tensor | None = None,
        inplace: bool | str = False,
    ) -> None:
        """Takes the options of `cross_entropy`."""
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = legacy_reduction(size_average, reduce)
        loss_options(ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, None)
        if dim is not None:
            _options.index("dim", dim)
        _check_word(inplace)
        self.register_buffer("weight", weight)
        self.register_buffer("logit_bias", logit_bias)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.dim = dim
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor, denominator: float | Tensor | None = None) -> Tensor:
        """The loss of these logits, see `cross_entropy`."""
        options: dict[str, Any] = {name: getattr(self, name) for name in self._OPTIONS}
        return cross_entropy(input, target, self.weight, logit_bias=self.logit_bias, denominator=denominator, **options)

    def extra_repr(self) -> str:
        """Shows the options that are numbers and words."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._OPTIONS)
