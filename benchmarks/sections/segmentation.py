# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: classes in dimension 1 of `(N, C, H, W)`, strided in memory."""

from __future__ import annotations

from ..cases import Case
from ..compare import compare_all, print_comparison, ratio
from ..report import Goal, Section
from ..settings import Settings


def measure(settings: Settings) -> Section:
    """Loss and gradient of (8, 150, 256, 256): ADE20K's classes at a common size."""
    section = Section("segmentation", "segmentation: classes in dimension 1")
    shape = (2, 150, 128, 128) if settings.quick else (8, 150, 256, 256)
    for dtype in ("float32", "bfloat16"):
        case = Case(shape, dtype)
        rows = compare_all(case, settings.peers, ["gradient", "gradient in place"], settings.rounds)
        print_comparison(f"segmentation, loss and gradient: {shape} {dtype}, {case.nbytes / 1e9:.2f} GB of logits", rows)
        section.goals.append(Goal(f"eager / fastloss, {dtype}", ratio(rows, "torch eager", "fastloss"), 4.0, True))
        section.rows += rows
    return section
