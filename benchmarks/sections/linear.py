# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy: loss and both gradients from hidden states and weights, exact and sampled."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..compare import ratio
from ..linear.case import LinearCase
from ..linear.compare import ALL_PRODUCTS, FORWARD_PRODUCT, compare_all, print_comparison
from ..peers import Peer
from ..peers.linear import CHUNKED, EXACT, OPERATION, REFERENCE, SAMPLED
from ..report import Goal, Section
from ..settings import Settings

CHUNKED_AT = 128256  # it takes half a minute a call


class Target(NamedTuple):
    """Times of the reference, and of PyTorch's chunked function, over ours: at least these."""

    tokens: int
    classes: int
    features: int
    dtype: str
    reference: tuple[float, float]  # exact, sampled
    chunked: tuple[float, float] | None


TARGETS = (
    Target(1024, 128256, 1024, "float32", (1.7, 5.0), (7.0, 20.0)),
    Target(1024, 128256, 1024, "bfloat16", (1.25, 3.2), (30.0, 80.0)),
    Target(4096, 50304, 256, "float32", (2.2, 5.0), None),
)
PRODUCTS = {"float32": (1.08, 1.2), "bfloat16": (1.08, 1.35)}  # ours over the bare products: at most these


def measure(settings: Settings) -> Section:
    """All peers on three heads, the bare products in the same rounds."""
    section = Section("linear", "linear cross-entropy: loss and both gradients")
    section.notes = [
        "GFLOP/s counts three products; one for the sampled backward.",
        "The bare products write into memory that is there: the best library, all tokens or a chunk at a time.",
        "Gradient error of the sampled backward: the bias of its probabilities, see benchmarks/linear/check.py.",
        f"{CHUNKED}: the one run whose answer is checked.",
    ]
    torch.manual_seed(0)
    for target in TARGETS:
        shrink = 4 if settings.quick else 1
        case = LinearCase(target.tokens // shrink, target.classes // shrink, target.features, target.dtype)
        rows = compare_all(case, _peers(settings, target.classes), settings.rounds)
        shape = " x ".join(map(str, case.shape))
        print_comparison(f"{section.title}: {shape} {case.dtype}", rows)
        section.rows += rows
        for ours, reference, chunked, mark, most in zip(
            (EXACT, SAMPLED),
            target.reference,
            target.chunked or (None, None),
            (ALL_PRODUCTS, FORWARD_PRODUCT),
            PRODUCTS[case.dtype],
            strict=True,
        ):
            where = f"{shape} {case.dtype}"
            section.goals.append(Goal(f"reference / {ours}, {where}", ratio(rows, REFERENCE, ours), reference, True))
            if chunked is not None:
                section.goals.append(Goal(f"chunked / {ours}, {where}", ratio(rows, CHUNKED, ours), chunked, True))
            section.goals.append(Goal(f"{ours} / {mark}, {where}", ratio(rows, ours, mark), most, False))
    return section


def _peers(settings: Settings, classes: int) -> dict[str, Peer]:
    return {
        name: peer
        for name, peer in settings.peers.items()
        if OPERATION in peer.jobs and (name != CHUNKED or classes == CHUNKED_AT)
    }
