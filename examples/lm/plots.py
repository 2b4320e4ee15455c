# SPDX-License-Identifier: Apache-2.0
"""Two plots: the loss curves, and what a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

from .losses import LOSSES
from .report import Result, difference, in_a_step

EQUAL = 1e-7  # where equal losses are drawn on the logarithmic axis
HEAD, REST = "#AAAAAA", "#DDDDDD"
STYLE = {
    "font.size": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def draw(results: list[Result], out: Path) -> list[Path]:
    """Writes `loss_curves.png` and `time_and_memory.png`."""
    with plt.rc_context(STYLE):
        return [_plot_curves(results, out / "loss_curves.png"), _plot_costs(results, out / "time_and_memory.png")]


def _plot_curves(results: list[Result], path: Path) -> Path:
    """All curves above, their distance from the first below."""
    figure, (curves, distances) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, height_ratios=(3, 1.2))
    # From wide and pale to thin and dark, so that curves that lie on each other can all be seen.
    widths = [2.0 + 3.5 * (len(results) - 1 - i) for i in range(len(results))]
    for r, width in zip(results, widths, strict=True):
        steps = range(1, len(r["losses"]) + 1)
        label = f"{r['title']}, validation {r['validation_loss']:.3f}"
        curves.plot(steps, r["losses"], color=LOSSES[r["loss"]].colour, linewidth=width, label=label, solid_capstyle="round")
    for r in results[1:]:
        gaps = [abs(x - y) for x, y in zip(results[0]["losses"], r["losses"], strict=True)]
        distances.semilogy(range(1, len(gaps) + 1), [max(gap, EQUAL) for gap in gaps], color=LOSSES[r["loss"]].colour)
    curves.set_ylabel("training loss (nats per token)")
    curves.legend()
    distances.set_ylabel(f"distance from {results[0]['loss']}\n({EQUAL:.0e} or less: equal)", fontsize=9)
    distances.set_xlabel(f"step (of {results[0]['tokens']} tokens)")
    for axes in (curves, distances):
        axes.grid()
    exact = [difference(results[0], r) for r in results[1:] if not r["sampled"]]
    sampled = [r["validation_loss"] - results[0]["validation_loss"] for r in results if r["sampled"]]
    claims = [f"exact losses within {max(exact):.0e}"] if exact else []
    claims += [f"sampled ends {gap:+.3f}" for gap in sampled]
    figure.suptitle(f"The same training: {', '.join(claims) or results[0]['loss']}", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _plot_costs(results: list[Result], path: Path) -> Path:
    """Time of a step in its parts, and memory in its parts."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11.5, 1.8 + 0.62 * len(results)), sharey=True)
    names = [r["loss"] for r in results]
    colours = [LOSSES[name].colour for name in names]
    loss = [1e3 * (r["loss_seconds"] or r["head_seconds"]) for r in results]
    head = [1e3 * r["head_seconds"] - ms for r, ms in zip(results, loss, strict=True)]
    rest = [1e3 * (r["step_seconds"] - r["head_seconds"]) for r in results]
    _stack(
        time,
        names,
        [
            (loss, colours, "loss (linear: head and loss)"),
            (head, HEAD, "head: matmuls"),
            (rest, REST, "model, optimiser"),
        ],
        "ms",
    )
    time.set_xlabel("milliseconds per step (median)")
    time.set_title("Time of a training step")
    step = [in_a_step(r) / 1e9 for r in results]
    standing = [r["standing_bytes"] / 1e9 for r in results]
    parts = [(step, colours, "comes and goes in a step"), (standing, REST, "model, optimiser, libraries")]
    _stack(memory, names, parts, "GB")
    memory.set_xlabel("peak resident memory (GB)")
    memory.set_title("Memory")
    first, last = results[0], results[-1]
    claim = f"{last['loss']} against {first['loss']}"
    if last["loss_seconds"] and first["loss_seconds"]:
        claim += f": loss {first['loss_seconds'] / last['loss_seconds']:.1f}x faster"
    else:
        claim += f": head and loss {first['head_seconds'] / last['head_seconds']:.1f}x faster"
    claim += f", step {first['step_seconds'] / last['step_seconds']:.2f}x faster"
    claim += f", {100 * (1 - in_a_step(last) / max(in_a_step(first), 1)):.0f} % less working memory"
    shape = f"{first['tokens']} tokens x {first['classes']:,} classes, width {first['width']}, {first['dtype']}"
    figure.suptitle(claim, x=0.01, ha="left")
    figure.text(0.995, 0.01, f"{shape}, {first['threads']} threads", ha="right", va="bottom", fontsize=7.5, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path)
    plt.close(figure)
    return path


def _stack(axes: Axes, names: list[str], parts: list[tuple[list[float], Any, str]], unit: str) -> None:
    """Horizontal bars from parts, each part's figure inside where it fits, the sum at the end."""
    left = [0.0] * len(names)
    total = [sum(values) for values in zip(*(part[0] for part in parts), strict=True)]
    first = parts[0][0]
    digits = 0 if unit == "ms" else 2
    for values, colour, label in parts:
        bars = axes.barh(names, values, left=left, color=colour, label=label, height=0.66, edgecolor="white")
        for bar, value in zip(bars, values, strict=True):
            if value > 0.09 * max(total):
                ink = "white" if label == parts[0][2] else "#333333"
                place = (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2)
                axes.text(*place, f"{value:.{digits}f}", ha="center", va="center", color=ink, fontsize=9)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, value in enumerate(total):
        hidden = "" if first[row] > 0.09 * max(total) else f" ({first[row]:.{digits}f} in colour)"
        axes.text(value + 0.01 * max(total), row, f"{value:.{digits}f} {unit}{hidden}", va="center", fontsize=9)
    axes.set_xlim(0, 1.16 * max(total))
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    if not axes.yaxis_inverted():  # the panels share it
        axes.invert_yaxis()
    below = offset_copy(axes.transAxes, axes.figure, y=-0.5, units="inches")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=len(parts), fontsize=8, columnspacing=1.2)
