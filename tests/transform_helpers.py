# SPDX-License-Identifier: Apache-2.0
"""Every function of `fastloss.torch` beside what it is in PyTorch, for tests of what may be done to functions."""

import pytest
import torch
from torch.nn import functional as F

import fastloss.torch as fl
from torch_helpers import seeded, seeded_ids, seeded_probabilities

TOKENS, CLASSES, FEATURES = 4, 5, 3
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
BACKENDS = ("eager", "aot_eager", "inductor")
ON_EACH_DEVICE = [
    # torch.compile and forward mode use what PyTorch itself has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("device", "compiled_afresh"),
]


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


HEAD = seeded(CLASSES, FEATURES, seed=1, scale=1.0)
PROBABILITIES = seeded_probabilities(TOKENS, CLASSES)
CLASS_WEIGHT = seeded(CLASSES, seed=3).abs()


def linear(hidden, ids=None, **options):
    target = PROBABILITIES.to(hidden.device) if ids is None else ids
    return fl.linear_cross_entropy(hidden, HEAD.to(hidden.device), target, **options)


def plain_linear(hidden, ids=None, **options):
    target = PROBABILITIES.to(hidden.device) if ids is None else ids
    return F.cross_entropy(F.linear(hidden, HEAD.to(hidden.device)), target, **options)


def log_probability(logits, ids):
    return torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits):
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


# Name: number of features, our function of rows and class ids, and what it is in PyTorch.
NONE = {"reduction": "none"}
SAMPLED = {"backward": "sampled", "threshold": 1e-12, "seed": 1}  # leaves nothing out
FUNCTIONS = {
    "cross_entropy": (CLASSES, fl.cross_entropy, F.cross_entropy),
    "rows": (CLASSES, lambda x, y: fl.cross_entropy(x, y, **NONE), lambda x, y: F.cross_entropy(x, y, **NONE)),
    "selective_log_softmax": (CLASSES, fl.selective_log_softmax, log_probability),
    "entropy_from_logits": (CLASSES, lambda x, y: fl.entropy_from_logits(x), lambda x, y: entropy(x)),
    "linear": (FEATURES, linear, plain_linear),
    "linear tokens": (FEATURES, lambda h, y: linear(h, y, **NONE), lambda h, y: plain_linear(h, y, **NONE)),
    "linear sampled": (FEATURES, lambda h, y: linear(h, y, **SAMPLED), plain_linear),
    "linear soft": (FEATURES, lambda h, y: linear(h), lambda h, y: plain_linear(h)),
    "linear_logit_stats": (
        FEATURES,
        lambda h, y: fl.linear_logit_stats(h, HEAD.to(h.device), y).logprob,
        lambda h, y: log_probability(F.linear(h, HEAD.to(h.device)), y),
    ),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def example(name):
    features, ours, theirs = FUNCTIONS[name]
    return ours, theirs, seeded(TOKENS, features), seeded_ids(CLASSES, TOKENS)


def gradient(function):
    return torch.func.grad(lambda x, y: function(x, y).sum())
