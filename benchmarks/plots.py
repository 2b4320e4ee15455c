# SPDX-License-Identifier: Apache-2.0
"""Plots of a result file: `python -m benchmarks.plots results/cpu-<model>.json` draws them again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .fit import OUT_OF_CACHE, fit_line, points
from .linear.plots import PLOTS as LINEAR_PLOTS
from .plot_style import COLOURS, STYLE, Row, add_caption, bars, milliseconds

STREAMS = ("stream read", "stream update")


def draw(path: Path) -> list[Path]:
    """Draws every section that the file has and that has a picture; returns the PNG files, beside the JSON."""
    result = json.loads(path.read_text())
    written = []
    with plt.rc_context(STYLE):
        for name, plot in PLOTS.items():
            rows = [row for row in result["sections"].get(name, {}).get("rows", []) if not row.get("wrong")]
            if not rows:
                continue
            figure = plot(rows)
            add_caption(figure, result["machine"])
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            figure.savefig(written[-1])
            plt.close(figure)
    return written


def _panels(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by dtype and number of classes, without the streams."""
    panels: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["peer"] not in STREAMS:
            panels.setdefault((row["dtype"], row["classes"]), []).append(row)
    return panels


def _large(rows: list[Row], what: str, peer: str, stream: str) -> Figure:
    """One panel for each dtype and vocabulary, with the time that the floor's traffic takes as a line."""
    panels = _panels(rows)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in panels))
    columns = max(len(panels) // len(dtypes), 1)
    height = 0.34 * max(map(len, panels.values())) + 1.0
    shape = (len(dtypes), columns)
    figure, grid = plt.subplots(*shape, figsize=(4.3 * columns + 1.2, height * len(dtypes) + 0.9), squeeze=False)
    speedups = []
    for axes, ((dtype, classes), panel) in zip(grid.flat, panels.items(), strict=True):
        bars(axes, panel, milliseconds, "ms")
        floor = [r["ms"] for r in rows if r["peer"] == stream and (r["dtype"], r["classes"]) == (dtype, classes)]
        if floor:
            axes.axvline(floor[0], color="#000000", linestyle=(0, (4, 2)), linewidth=1, label="memory stream limit")
            axes.legend(loc="upper right", fontsize=8)
        axes.set_title(f"{dtype}, {panel[0]['rows']} rows x {classes:,} classes")
        axes.set_xlabel("milliseconds, median (whiskers: quartiles)")
        times = {row["peer"]: row["ms"] for row in panel}
        if peer in times and "torch eager" in times:
            speedups.append(times["torch eager"] / times[peer])
    claim = f": {min(speedups):.1f} to {max(speedups):.1f} times as fast as PyTorch eager" if speedups else ""
    figure.suptitle(f"{what}{claim}" if columns > 1 else f"{what}{claim}".replace(": ", ":\n"), x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _loss(rows: list[Row]) -> Figure:
    return _large(rows, "Cross-entropy loss", "fastloss", "stream read")


def _gradient(rows: list[Row]) -> Figure:
    return _large(rows, "Loss and gradient", "fastloss", "stream update")


def _segmentation(rows: list[Row]) -> Figure:
    shape = tuple(rows[0]["shape"])
    return _large(rows, f"Segmentation {shape}, loss and gradient", "fastloss", "stream update")


def _memory(rows: list[Row]) -> Figure:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, grid = plt.subplots(1, len(dtypes), figsize=(5.0 * len(dtypes) + 0.8, 3.4), squeeze=False)
    for axes, dtype in zip(grid.flat, dtypes, strict=True):
        panel = [row for row in rows if row["dtype"] == dtype]
        bars(axes, panel, lambda mb: f"{mb / 1e3:.2f} GB" if mb >= 100 else f"{mb:.1f} MB", "peak_mb")
        axes.axvline(panel[0]["logits_mb"], color="#000000", linestyle=(0, (4, 2)), linewidth=1, label="size of the logits")
        axes.legend(loc="upper right", fontsize=8)
        axes.set_title(f"{dtype}, {panel[0]['shape'][0]} rows x {panel[0]['shape'][1]:,} classes")
        axes.set_xlabel("MB")
    units = [row["peak_mb"] / row["logits_mb"] for row in rows if row["peer"] == "fastloss"]
    claim = f": fastloss at most {max(units):.2f} times the logits" if units else ""
    figure.suptitle(f"Peak memory of loss and gradient, beyond the logits{claim}", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _growth(rows: list[Row]) -> Figure:
    figure, grid = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, (axis, index) in zip(grid, (("V", 1), ("N", 0)), strict=True):
        for peer in dict.fromkeys(row["peer"] for row in rows):
            found = points(rows, peer, axis)
            if found:
                axes.loglog(*zip(*found, strict=True), "o-", color=COLOURS[peer], label=peer, markersize=5)
        shown = [row for row in rows if row["axis"] == axis]
        sizes = [row["shape"][index] for row in shown]
        largest = max((row for row in shown if row["peer"].startswith("fastloss")), key=lambda r: r["ms"], default=None)
        if largest is not None:
            ends = [min(sizes), max(sizes)]
            guide = [largest["ms"] * size / largest["shape"][index] for size in ends]
            axes.loglog(ends, guide, color="#000000", linestyle=(0, (1, 2)), linewidth=1, label="proportional")
        other = shown[-1]["shape"][1 - index]
        axes.set_xlabel("classes V" if axis == "V" else "rows N")
        axes.set_title(f"N = {other:,} rows" if axis == "V" else f"V = {other:,} classes")
        axes.grid(which="major")
    grid[0].set_ylabel("milliseconds, loss and gradient")
    grid[0].legend()
    lines = [(axis, fit_line(points(rows, "fastloss", axis, OUT_OF_CACHE))) for axis in "NV"]
    claim = " and ".join(f"{line.distance:.0%} in {axis}" for axis, line in lines if line is not None)
    figure.suptitle(f"Time of fastloss beyond the cache: farthest from a line, {claim} (float32)", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _small(rows: list[Row]) -> Figure:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    light, dark = COLOURS["fastloss in place"], COLOURS["fastloss"]
    shown = {}
    for operation, colour in (("forward", light), ("forward + backward", dark)):
        of_operation = [row for row in rows if row["operation"] == operation and row["ratio"]]
        shown[operation] = [row["ratio"] for row in of_operation]
        labels = ["\nx ".join(map(str, row["shape"])) for row in of_operation]
        axes.plot(labels, shown[operation], "o", color=colour, label=operation)
    for place, pair in enumerate(zip(*shown.values(), strict=True)):
        for ratio, side in ((max(pair), 7), (min(pair), -13)):
            axes.annotate(f"{ratio:.2f}", (place, ratio), (0, side), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(1, color="#000000", linewidth=1, linestyle=(0, (4, 2)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time of fastloss / time of PyTorch eager")
    axes.set_xlabel("shape of the logits, float32: classes come second")
    axes.grid(axis="y")
    axes.legend()
    figure.suptitle("Small inputs and few classes: below the line fastloss is faster", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


PLOTS: dict[str, Callable[[list[Row]], Figure]] = {
    "loss": _loss,
    "gradient": _gradient,
    "segmentation": _segmentation,
    "memory": _memory,
    "growth": _growth,
    "small": _small,
    **LINEAR_PLOTS,
}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for png in draw(Path(argument)):
            print(png)
