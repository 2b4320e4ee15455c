# SPDX-License-Identifier: Apache-2.0
"""What all plots share: colours, style, caption, bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by lightness.
COLOURS = {
    "fastloss": "#0072B2",
    "fastloss in place": "#56B4E9",
    "fastloss in backward": "#0A4A75",
    "fastloss numpy": "#009E73",
    "torch eager": "#D55E00",
    "torch.compile": "#E69F00",
    "optax (jax)": "#CC79A7",
    "scipy log_softmax": "#F0E442",
    "logits.clone()": "#999999",
    "fastloss exact": "#0072B2",
    "fastloss sampled": "#56B4E9",
    "F.linear + F.cross_entropy": "#D55E00",
    "F.linear_cross_entropy, chunked": "#E69F00",
    # Of a GPU alone.
    "PyTorch eager": "#D55E00",
    "PyTorch chunked": "#F0E442",
    "liger-kernel": "#CC79A7",
    "quack-kernels": "#009E73",
    "cut-cross-entropy": "#999999",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "savefig.dpi": 160,
    "legend.frameon": False,
}


def add_caption(figure: Figure, machine: dict[str, Any]) -> None:
    """The small print of a figure: what was measured where."""
    versions = machine["versions"]
    parts = [machine["cpu"], f"{machine['threads']} threads", machine.get("isa") or ""]
    parts += [f"PyTorch {versions['torch']}", f"commit {machine['commit']}" if machine["commit"] else ""]
    text = ", ".join(part for part in [*parts, machine["date"][:10]] if part)
    figure.text(0.995, 0.003, text, ha="right", va="bottom", fontsize=7, color="#666666")


def milliseconds(value: float) -> str:
    """A time at the end of a bar."""
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


def bars(axes: Axes, rows: list[Row], label: Callable[[float], str], key: str) -> None:
    """Horizontal bars, the label at the end of each."""
    longest = max(max(row[key], row.get("ms_high", 0)) for row in rows)
    for place, row in enumerate(rows):
        low, high = row.get("ms_low"), row.get("ms_high")
        error = [[row[key] - low], [high - row[key]]] if low is not None and key == "ms" else None
        axes.barh(place, row[key], color=COLOURS.get(row["peer"], "#BBBBBB"), height=0.72, xerr=error, ecolor="#333333")
        axes.text(max(row[key], high or 0) + 0.015 * longest, place, label(row[key]), va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [row["peer"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
