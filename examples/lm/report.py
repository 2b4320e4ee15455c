# SPDX-License-Identifier: Apache-2.0
"""What the runs show: a table and a few honest words."""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import Config

Result = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 120)  # the table keeps its columns in a log file


def introduce(config: Config) -> None:
    """Says what is about to happen."""
    console.print(
        f"A transformer of width {config.width} learns Python's standard library: {config.steps} steps of "
        f"{config.tokens} tokens, {config.vocab or 151643:,} classes, {config.dtype} logits."
    )


def table(results: list[Result]) -> None:
    """Time, memory and quality of each run. Where no logits are stored, the loss is within the head."""
    shown = Table(
        title="Same model, seed and batches; medians over the steps",
        title_justify="left",
        title_style="bold",
    )
    shown.add_column("loss")
    for header in ("step", "head + loss", "loss alone", "peak memory", "in a step", "val. loss", "perplexity"):
        shown.add_column(header, justify="right")
    for r in results:
        shown.add_row(
            r["loss"],
            f"{1e3 * r['step_seconds']:.0f} ms",
            f"{1e3 * r['head_seconds']:.0f} ms",
            f"{1e3 * r['loss_seconds']:.0f} ms" if r["loss_seconds"] else "-",
            f"{r['peak_bytes'] / 1e9:.2f} GB",
            f"{in_a_step(r) / 1e9:.2f} GB",
            f"{r['validation_loss']:.4f}",
            f"{math.exp(min(r['validation_loss'], 20)):.1f}",
        )
    console.print(shown)


def honest_words(results: list[Result]) -> None:
    """What the table means, and what it does not."""
    first = results[0]
    step, rest = first["step_seconds"], first["step_seconds"] - first["loss_seconds"]
    if first["loss_seconds"]:
        console.print(
            f"With {first['loss']}, the loss is {100 * (1 - rest / step):.0f} % of a step. The other {1e3 * rest:.0f} ms "
            "(matmuls of the head, model, optimiser) stay as they are whatever the loss on stored logits, "
            f"so a step can become at most {step / rest:.2f} times as fast. With a wider model the share is smaller. "
            "The linear losses make the logits themselves, a few tokens at a time: head and loss are one."
        )
    for r in results[1:]:
        words = f"{r['loss']}: against {first['loss']}, the step is {step / r['step_seconds']:.2f} times as fast"
        if r["loss_seconds"] and first["loss_seconds"]:
            words += f", the loss {first['loss_seconds'] / r['loss_seconds']:.1f} times"
        else:
            words += f", head and loss {first['head_seconds'] / r['head_seconds']:.1f} times"
        by = "by" if not r["sampled"] else "as its gradients are random ones, by"
        console.print(f"{words}; the training losses differ, {by} at most {difference(first, r):.1e}.")


def difference(a: Result, b: Result) -> float:
    """The largest distance between two loss curves."""
    return max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))


def in_a_step(result: Result) -> int:
    """Bytes that come and go in a step: beyond weights, optimiser state and libraries."""
    return max(0, int(result["peak_bytes"] - result["standing_bytes"]))
