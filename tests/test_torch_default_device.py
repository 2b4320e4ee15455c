# SPDX-License-Identifier: Apache-2.0
"""CPU tensors where PyTorch's default device is another: nothing that fastloss makes on the way follows it."""

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from torch_helpers import same_bits, seeded, seeded_ids, seeded_probabilities  # noqa: E402

TOKENS, CLASSES, FEATURES = 9, 700, 8


def gradients(call, dtype, context):
    """The sum of what the call returns, and its gradients by four leaves."""
    shapes = ((TOKENS, CLASSES), (TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    leaves = [seeded(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    target = seeded_ids(CLASSES, TOKENS)
    target[2] = -100 if "stats" not in call else 3
    with context:
        value = CALLS[call](*leaves, target).sum()
        value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


SAMPLED = {"backward": "sampled", "seed": 1}
PLACES = (CLASSES // 2, 2)
CALLS = {
    "cross_entropy": lambda x, h, w, b, y: fl.cross_entropy(x, y),
    "rows": lambda x, h, w, b, y: fl.cross_entropy(x, y, reduction="none", label_smoothing=0.1),
    "in place": lambda x, h, w, b, y: fl.cross_entropy(x * 1, y, inplace=True),
    "logit_stats": lambda x, h, w, b, y: fl.logit_stats(x, y).entropy,
    "linear": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, y, linear_bias=b),
    "linear tokens": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, y, linear_bias=b, reduction="none"),
    "linear chunks": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, y, linear_bias=b, chunk_tokens=2),
    "linear sampled": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, y, linear_bias=b, **SAMPLED),
    "linear sparse": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, y, linear_bias=b, sparse=True, **SAMPLED),
    "linear soft": lambda x, h, w, b, y: fl.linear_cross_entropy(h, w, SOFT.to(h.dtype), linear_bias=b),
    "linear places": lambda x, h, w, b, y: fl.linear_cross_entropy(
        h, w.view(*PLACES, FEATURES), y[:, None].expand(-1, 2) % 350
    ),
    "linear_logit_stats": lambda x, h, w, b, y: fl.linear_logit_stats(h, w, y, bias=b).logprob,
}
SOFT = seeded_probabilities(TOKENS, CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_is_not_asked(call, dtype):
    for one, other in zip(*(gradients(call, dtype, context) for context in (torch.device("meta"), nullcontext())), strict=True):
        assert one.device.type == "cpu"
        assert same_bits(*(t.to_dense() if t.is_sparse else t for t in (one, other)))
