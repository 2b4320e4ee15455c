# SPDX-License-Identifier: Apache-2.0
"""Peak memory of linear cross-entropy, beyond factors and gradients, each peer in a process of its own."""

from __future__ import annotations

import math
from typing import Any

from ..linear.case import LinearCase
from ..machine import available_memory
from ..peers.linear import EXACT, OPERATION, REFERENCE, SAMPLED
from ..report import Goal, Section, print_rows
from ..settings import Settings
from .memory import probe

SHAPE, DTYPE = (8192, 256000, 1024), "bfloat16"
LIMIT_MB = 200.0
STORED = 4  # tensors of the size of the logits, which the reference needs at most
AGREEMENT = 2e-2  # between the losses: eager's bfloat16 is no better


def measure(settings: Settings) -> Section:
    """Growth of the peak resident size over one call, the factors standing already."""
    section = Section("linear-memory", "peak memory of linear cross-entropy, beyond factors and gradients")
    tokens, classes, features = SHAPE
    case = LinearCase(tokens // (8 if settings.quick else 1), classes, features, DTYPE)
    logits_mb = case.logits_bytes / 1e6
    for name in (EXACT, SAMPLED, REFERENCE):
        if name not in settings.peers or OPERATION not in settings.peers[name].jobs:
            continue
        if name == REFERENCE and available_memory() < (STORED + 1) * case.logits_bytes:
            section.notes.append(f"{name} was left out: not enough memory for {STORED} times {logits_mb:.0f} MB")
            continue
        found = probe("benchmarks.linear.memory_probe", name, DTYPE, *map(str, case.shape))
        if found is not None:
            section.rows.append(_row(case, name) | found)
    for row in section.rows:
        row["extra_mb"] = row["peak_mb"] - row["gradients_mb"] - row["accumulator_mb"]
        if not math.isclose(row["loss"], section.rows[0]["loss"], rel_tol=AGREEMENT):
            row["wrong"] = f"a loss of {row['loss']}"
    print_rows(
        f"{section.title}: {' x '.join(map(str, case.shape))} {DTYPE}, {logits_mb:.0f} MB of logits",
        section.rows,
        [
            ("peer", lambda r: r["peer"]),
            ("loss", lambda r: f"{r['loss']:.4f}"),
            ("peak beyond factors MB", lambda r: f"{r['peak_mb']:.0f}"),
            ("gradients MB", lambda r: f"{r['gradients_mb']:.0f}"),
            ("float32 sum MB", lambda r: f"{r['accumulator_mb']:.0f}"),
            ("beyond those MB", lambda r: f"{r['extra_mb']:.0f}"),
        ],
    )
    found = {row["peer"]: row["extra_mb"] for row in section.rows if "wrong" not in row}
    section.goals = [Goal(f"{name}, {DTYPE}", found.get(name), LIMIT_MB, False, "MB") for name in (EXACT, SAMPLED)]
    return section


def _row(case: LinearCase, peer: str) -> dict[str, Any]:
    """With the size of what the exact backward sums a 16-bit gradient by the weights in."""
    accumulator_mb = 4 * case.classes * case.features / 1e6 if peer == EXACT else 0.0
    return {
        "peer": peer,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "logits_mb": case.logits_bytes / 1e6,
        "accumulator_mb": accumulator_mb,
    }
