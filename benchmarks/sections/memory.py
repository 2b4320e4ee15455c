# SPDX-License-Identifier: Apache-2.0
"""Peak memory of loss and gradient, each peer in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..report import Goal, Section, console, print_rows
from ..settings import Settings

IN_PLACE_LIMIT_MB = 4.0  # O(N): 1024 rows need far below 1 MB; the rest is what any call touches


def measure(settings: Settings) -> Section:
    """Growth of the peak resident size over one call, the logits standing already."""
    section = Section("memory", "peak memory of loss and gradient, beyond the logits")
    classes = 128256
    shape = (settings.rows(classes), classes)
    for dtype in ("float32", "bfloat16"):
        for name, peer in settings.peers.items():
            operation = next((op for op in ("gradient", "gradient in place") if op in peer.jobs), None)
            if operation is None or dtype not in peer.bounds:
                continue
            found = probe("benchmarks.memory_probe", name, operation, dtype, *map(str, shape))
            if found is not None:
                section.rows.append({"peer": name, "dtype": dtype, "shape": list(shape)} | found)
    print_rows(
        section.title + f": {shape[0]} x {classes}",
        section.rows,
        [
            ("peer", lambda r: r["peer"]),
            ("dtype", lambda r: r["dtype"]),
            ("logits MB", lambda r: f"{r['logits_mb']:.0f}"),
            ("peak beyond them MB", lambda r: f"{r['peak_mb']:.1f}"),
            ("in units of the logits", lambda r: f"{r['peak_mb'] / r['logits_mb']:.2f}"),
        ],
    )
    for dtype in ("float32", "bfloat16"):
        found = {row["peer"]: row for row in section.rows if row["dtype"] == dtype}
        fresh, in_place = found.get("fastloss"), found.get("fastloss in place")
        # One gradient tensor, and as much as the in-place call may have.
        units = None if fresh is None else fresh["peak_mb"] / fresh["logits_mb"]
        target = 1.0 if fresh is None else 1.0 + IN_PLACE_LIMIT_MB / fresh["logits_mb"]
        section.goals += [
            Goal(f"fresh, {dtype}", units, target, False, "gradient tensors"),
            Goal(f"in place, {dtype}", None if in_place is None else in_place["peak_mb"], IN_PLACE_LIMIT_MB, False, "MB"),
        ]
    return section


def probe(module: str, peer: str, *arguments: str) -> dict[str, Any] | None:
    """What a probe prints as JSON; it has a process of its own. None where it fails or cannot do the case."""
    # Every large block is mapped on its own and goes back when freed: what the first run leaves behind hides nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", module, peer, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        console.print(f"[red]memory of {peer}, {arguments}: {done.stderr.strip().splitlines()[-1:]}[/]")
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result or None
