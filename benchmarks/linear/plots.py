# SPDX-License-Identifier: Apache-2.0
"""Pictures of linear cross-entropy: time, memory, growth, threshold."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..fit import fit_line, points
from ..peers.linear import CHUNKED, EXACT, REFERENCE, SAMPLED
from ..plot_style import COLOURS, Row, bars, milliseconds
from .compare import ALL_PRODUCTS, FORWARD_PRODUCT, MARKS

LINES = {ALL_PRODUCTS: (0, (4, 2)), FORWARD_PRODUCT: (0, (1, 2))}
GRADIENTS, SUM = "#BBBBBB", "#DDDDDD"


def _shape(row: Row) -> str:
    tokens, classes, features = row["shape"]
    return f"{tokens} tokens x {classes:,} classes x {features} features"


def _time(rows: list[Row]) -> Figure:
    """One panel for each head; the bare products are lines."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["dtype"], *map(str, row["shape"])), []).append(row)
    figure, grid = plt.subplots(len(panels), 1, figsize=(9, 2.1 * len(panels) + 0.9), squeeze=False)
    speedups: dict[str, list[float]] = {EXACT: [], SAMPLED: []}
    for axes, panel in zip(grid.flat, panels.values(), strict=True):
        shown = [row for row in panel if row["peer"] not in MARKS]
        cut = 1.25 * max(row["ms"] for row in shown if row["peer"] != CHUNKED)
        beyond = [row["ms"] for row in shown if row["ms"] > cut]
        shown = [{"peer": row["peer"], "ms": cut} if row["ms"] > cut else row for row in shown]
        bars(axes, shown, lambda ms, cut=cut, beyond=beyond: seconds(beyond) if ms == cut else milliseconds(ms), "ms")
        times = {row["peer"]: row["ms"] for row in panel}
        for mark, style in LINES.items():
            if mark in times:
                axes.axvline(times[mark], color="#000000", linestyle=style, linewidth=1, label=f"{mark} alone")
        for ours, found in speedups.items():
            if ours in times and REFERENCE in times:
                found.append(times[REFERENCE] / times[ours])
        axes.set_title(f"{panel[0]['dtype']}, {_shape(panel[0])}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=8.5)
    grid[-1, 0].set_xlabel("milliseconds for loss and both gradients, median (whiskers: quartiles)")
    claims = [f"{name.split()[-1]} {min(found):.1f} to {max(found):.1f}" for name, found in speedups.items() if found]
    figure.suptitle(
        f"Times as fast as with stored logits: {', '.join(claims)}" if claims else "Linear cross-entropy", x=0.01, ha="left"
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    return figure


def seconds(beyond: list[float]) -> str:
    """The label of a bar that goes on beyond the axis."""
    return ", ".join(f"{ms / 1e3:.0f} s" for ms in beyond) + " (cut)"


def _memory(rows: list[Row]) -> Figure:
    """Bars in parts: the gradients that were asked for, the float32 sum, and the rest."""
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.5 * len(rows)))
    names = [row["peer"] for row in rows]
    colours = [COLOURS[name] for name in names]
    left = [0.0] * len(rows)
    for key, colour, label in (
        ("gradients_mb", GRADIENTS, "the gradients"),
        ("accumulator_mb", SUM, "float32 sum of the gradient by the weights"),
        ("extra_mb", colours, "everything else"),
    ):
        sizes = [row[key] / 1e3 for row in rows]
        axes.barh(names, sizes, left=left, color=colour, height=0.66, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, row in enumerate(rows):
        extra = row["extra_mb"]
        size = f"{extra / 1e3:.1f} GB" if extra >= 1000 else f"{extra:.0f} MB"
        text = f"{left[place]:.2f} GB, {size} of it in colour"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line of the logits passes behind
        axes.text(left[place] + 0.01 * max(left), place, text, va="center", fontsize=8.5, bbox=box)
    logits = rows[0]["logits_mb"] / 1e3
    axes.axvline(logits, color="#000000", linestyle=(0, (4, 2)), linewidth=1, label=f"the logits: {logits:.1f} GB")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(left))
    axes.set_xlabel("GB at the peak, beyond hidden states and weights")
    axes.set_title(f"{rows[0]['dtype']}, {_shape(rows[0])}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0, 0.04), ncols=4, fontsize=8)
    extras = [row["extra_mb"] for row in rows if row["peer"] in (EXACT, SAMPLED)]
    claim = f": {max(extras):.0f} MB beside the gradients and their sum" if extras else ""
    figure.suptitle(f"Peak memory{claim}", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def _growth(rows: list[Row]) -> Figure:
    figure, grid = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axes, (axis, name) in zip(grid, (("N", "tokens N"), ("V", "classes V"), ("H", "features H")), strict=True):
        index = "NVH".index(axis)
        for peer in (EXACT, SAMPLED):
            found = points(rows, peer, axis)
            line = fit_line(found)
            axes.loglog(*zip(*found, strict=True), "o", color=COLOURS[peer], label=peer, markersize=5)
            if line is not None:
                label = f"{line.offset:.3g} + {line.slope:.3g} {axis}, within {line.distance:.1%}"
                fitted = [(size, line.offset + line.slope * size) for size, _ in found]
                axes.loglog(*zip(*fitted, strict=True), color=COLOURS[peer], linewidth=1, label=label)
        shape = next(row["shape"] for row in rows if row["axis"] == axis)
        others = ", ".join(f"{letter} = {size:,}" for letter, size in zip("NVH", shape, strict=True) if letter != axis)
        axes.set_title(others)
        axes.set_xlabel(name)
        sizes = sorted({row["shape"][index] for row in rows if row["axis"] == axis})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(which="major")
        axes.legend(loc="upper left")
    grid[0].set_ylim(top=8 * max(row["ms"] for row in rows if "wrong" not in row))  # room for the legends
    grid[0].set_ylabel("milliseconds, loss and both gradients")
    figure.suptitle("Time over tokens, classes and features, and the nearest lines (float32)", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _threshold(rows: list[Row]) -> Figure:
    """Time, entries and variance over the threshold."""
    figure, (time, entries, variance) = plt.subplots(1, 3, figsize=(12, 4))
    sweep = [row for row in rows if "threshold" in row]
    x = [row["threshold"] for row in sweep]
    colour = COLOURS[SAMPLED]
    time.plot(x, [row["ms"] for row in sweep], "o-", color=colour)
    marks = {row["peer"]: row["ms"] for row in rows if "threshold" not in row}
    for name, label, style in ((EXACT, "exact backward", "-"), (FORWARD_PRODUCT, FORWARD_PRODUCT, LINES[FORWARD_PRODUCT])):
        time.axhline(marks[name], color="#000000", linestyle=style, linewidth=1, label=label)
    time.set_ylim(0, 1.15 * max(marks.values()))
    time.set_ylabel("milliseconds, loss and both gradients")
    time.legend(loc="center right", fontsize=8.5)
    _log_curve(entries, x, [row["entries"] for row in sweep], colour)
    _guide(entries, x, [1 / threshold for threshold in x], "1 / threshold")
    entries.set_ylabel("entries kept of a token's gradient")
    _log_curve(variance, x, [row["variance_hidden"] for row in sweep], colour, "by hidden states")
    _log_curve(variance, x, [row["variance_weight"] for row in sweep], COLOURS[EXACT], "by weights", "x--")
    last = sweep[-1]
    _guide(variance, x, [last["variance_hidden"] * t / last["threshold"] for t in x], "proportional to threshold")
    variance.set_ylabel("variance of a gradient / its square")
    for axes in (time, entries, variance):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x[::2])
        axes.set_xlabel("threshold")
        axes.grid()
    figure.suptitle(f"The sampled backward: {_shape(rows[0])}, float32", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _log_curve(axes: Axes, x: list[float], y: list[float], colour: str, label: str = "", marker: str = "o-") -> None:
    axes.plot(x, y, marker, color=colour, label=label)
    axes.set_yscale("log")


def _guide(axes: Axes, x: list[float], y: list[float], label: str) -> None:
    axes.plot(x, y, color="#000000", linestyle=(0, (1, 2)), linewidth=1, label=label)
    axes.legend(fontsize=8.5)


PLOTS: dict[str, Callable[[list[Row]], Figure]] = {
    "linear": _time,
    "linear-memory": _memory,
    "linear-growth": _growth,
    "linear-threshold": _threshold,
}
