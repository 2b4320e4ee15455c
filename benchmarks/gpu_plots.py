# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu_plots RESULTS.json` draws the plots of `benchmarks.gpu` again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot_style import COLOURS, STYLE, Row


def draw(results: dict[str, Any], path: Path) -> None:
    """Bandwidths beside `path`, and of linear cross-entropy times and memory."""
    matplotlib.use("Agg")
    with pyplot.rc_context(STYLE):
        if rows := [row for row in results["rows"] if "ms" in row and row["peer"] != "copy"]:
            save(bandwidths(rows), results["machine"], path.with_suffix(".png"))
        if rows := [row for row in results["linear"] if "ms" in row]:
            save(linear(rows), results["machine"], path.with_name(f"{path.stem}-linear.png"))


def bandwidths(rows: list[Row]) -> Figure:
    """A panel a case, a group of bars an operation."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(8.5, 2.9 * len(cases)), sharex=True, squeeze=False)
    for axes, case in zip(panels[:, 0], cases, strict=True):
        of_case = [row for row in rows if row["case"] == case]
        places, names, place = [], [], 0.0
        for operation in dict.fromkeys(row["operation"] for row in of_case):
            group = [row for row in of_case if row["operation"] == operation]
            for row in group:
                axes.barh(place, row["percent_of_copy"], color=COLOURS[row["peer"]])
                axes.text(row["percent_of_copy"] + 0.6, place, f"{row['ms']:.2f} ms", va="center", fontsize=7)
                place += 1
            places.append(place - (len(group) + 1) / 2)
            names.append(operation)
            place += 0.7
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.axvline(100, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_title(case)
        axes.set_xlim(0, 118)
    panels[-1, 0].set_xlabel("% of the bandwidth of a copy in the same run, for the bytes that the operation must move")
    add_legend(panels[0, 0], rows)
    figure.tight_layout(rect=(0, 0.01, 1, 1))
    return figure


def linear(rows: list[Row]) -> Figure:
    """A row of panels a case: time, and memory beside the factors."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = pyplot.subplots(len(cases), 2, figsize=(9.5, 2.3 * len(cases)), squeeze=False)
    for (times, memory), case in zip(panels, cases, strict=True):
        of_case = [row for row in rows if row["case"] == case]
        for axes, key, form in ((times, "ms", "{:.1f} ms"), (memory, "peak_gb", "{:.2f} GB")):
            for place, row in enumerate(of_case):
                axes.barh(place, row[key], color=COLOURS[row["peer"]])
                axes.text(row[key], place, " " + form.format(row[key]), va="center", fontsize=8)
            axes.set_xlim(0, 1.2 * max(row[key] for row in of_case))
            axes.invert_yaxis()
        times.set_yticks(range(len(of_case)), [row["peer"] for row in of_case])
        memory.set_yticks([])
        times.set_title(case)
        memory.set_title("peak memory, both gradients included")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def add_legend(axes: Axes, rows: list[Row]) -> None:
    """Of the peers."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[peer]) for peer in peers]
    axes.legend(handles, peers, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.03))


def save(figure: Figure, machine: dict[str, str], path: Path) -> None:
    """With the small print of what was measured where."""
    text = f"{machine['gpu']}, PyTorch {machine['torch']}, {machine['build']}, commit {machine['commit']}, {machine['date']}"
    figure.text(0.995, 0.002, text, ha="right", va="bottom", fontsize=7, color="#666666")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
