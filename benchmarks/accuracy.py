# SPDX-License-Identifier: Apache-2.0
"""Accuracy: `python -m benchmarks.accuracy` compares fastloss and PyTorch eager with a wider arithmetic.

For each dtype and kind of row: the error of a row's loss, relative to the loss, and of the entries of its gradient,
relative to the entry, both on the stored (rounded) logits. The reference is float64; for float64 logits it is the
80-bit `longdouble` where there is one. The gradient is that of 1024 times the loss, as a loss scaler has it, so that
float16 does not underflow; entries below the smallest normal number of the dtype are left out. Writes `accuracy.json`
and `accuracy.png` to `benchmarks/results/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import fastloss.torch

from . import machine, plot_style
from .report import console, print_rows

ROWS, CLASSES, SCALE = 32, 128256, 1024.0
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def _random(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Normal logits, standard deviation 2: every class is unlikely."""
    return logits


def _confident(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The target has nearly all of the probability, from 0.9 to 1 - 1e-6: its gradient p - 1 cancels."""
    odds = torch.logspace(1, 6, len(target), dtype=logits.dtype)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf).logsumexp(1)
    return logits.scatter(1, target.unsqueeze(1), (others + odds.log()).unsqueeze(1))


def _offset(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The random rows, moved up by 10,000: the same probabilities, but for the rounding of the logits."""
    return logits + 1e4


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "random": _random,
    "confident": _confident,
    "offset 1e4": _offset,
}
PEERS: dict[str, Callable[..., torch.Tensor]] = {
    "fastloss": fastloss.torch.cross_entropy,
    "torch eager": F.cross_entropy,
}


def main() -> None:
    """Measures, prints, and writes JSON and plot."""
    rows = [row for dtype in DTYPES for kind in KINDS for row in _measure(dtype, kind)]
    print_rows(
        f"relative error, {ROWS} rows x {CLASSES} classes",
        rows,
        [
            ("dtype", lambda r: r["dtype"]),
            ("rows", lambda r: r["kind"]),
            ("", lambda r: r["peer"]),
            *((name, lambda r, key=key: f"{r[key]:.1e}") for name, key in HEADERS.items()),  # type: ignore[misc]
        ],
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "accuracy.json"
    path.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")
    console.print(f"wrote {path} and {draw(path)}")


TITLE = "Relative error against wider arithmetic: largest (filled) and median (hollow)"
HEADERS = {
    "loss, median": "loss_median",
    "loss, max": "loss_max",
    "gradient, median": "gradient_median",
    "gradient, max": "gradient_max",
    "rounding alone, max": "rounding_max",
}


def _measure(dtype: torch.dtype, kind: str) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    logits = 2 * torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=generator)
    logits = KINDS[kind](logits, target).to(dtype)
    wide = np.longdouble if dtype == torch.float64 else np.float64
    if np.finfo(wide).eps > torch.finfo(dtype).eps / 8:
        return []
    loss, gradient = _reference(logits.double().numpy().astype(wide), target.numpy())
    counted = np.abs(gradient) >= torch.finfo(dtype).tiny
    found = []
    for name, function in PEERS.items():
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, target, reduction="none")
        losses.backward(torch.full_like(losses, SCALE))
        assert leaf.grad is not None
        loss_error = np.abs(losses.detach().double().numpy() - loss) / loss
        gradient_error = np.abs(leaf.grad.double().numpy() - gradient)[counted] / np.abs(gradient[counted])
        row: Row = {"dtype": str(dtype).removeprefix("torch."), "kind": kind, "peer": name}
        row["rounding_max"] = torch.finfo(dtype).eps / 2
        for what, error in (("loss", loss_error), ("gradient", gradient_error)):
            row |= {f"{what}_median": float(np.median(error)), f"{what}_max": float(error.max())}
        found.append(row)
    return found


def _reference(z: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each row, and SCALE times its gradient; the target's entry is minus the sum of the others."""
    rows = np.arange(len(z))
    weights = np.exp(z - z.max(1, keepdims=True))
    others = weights.copy()
    others[rows, target] = 0
    gradient = SCALE * weights / weights.sum(1, keepdims=True)
    odds_against = others.sum(1) / weights[rows, target]
    gradient[rows, target] = -SCALE * others.sum(1) / weights.sum(1)
    return np.log1p(odds_against), gradient


def draw(path: Path) -> Path:
    """Maximum (filled) and median (hollow) of each kind, one panel for each dtype and quantity."""
    result = json.loads(path.read_text())
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    with plt.rc_context(plot_style.STYLE):
        figure, grid = plt.subplots(2, len(dtypes), figsize=(3.3 * len(dtypes), 6), squeeze=False, sharex=True)
        for column, dtype in enumerate(dtypes):
            for line, what in enumerate(("loss", "gradient")):
                axes = grid[line, column]
                panel = [row for row in result["rows"] if row["dtype"] == dtype]
                _dots(axes, panel, what)
                axes.set_title(f"{dtype}: {what}")
        for axes in grid[:, 0]:
            axes.set_ylabel("relative error")
        grid[0, 0].legend(fontsize=8, loc="best")
        figure.suptitle(TITLE, x=0.01, ha="left")
        plot_style.add_caption(figure, result["machine"])
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        png = path.with_suffix(".png")
        figure.savefig(png)
        plt.close(figure)
    return png


def _dots(axes: Any, panel: list[Row], what: str) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in panel))
    for shift, peer, marker in ((-0.12, "fastloss", "o"), (0.12, "torch eager", "s")):
        shown = [row for row in panel if row["peer"] == peer]
        x = [kinds.index(row["kind"]) + shift for row in shown]
        low, high = ([max(row[f"{what}_{end}"], 1e-20) for row in shown] for end in ("median", "max"))
        colour = plot_style.COLOURS[peer]
        axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.plot(x, high, marker, color=colour, label=peer)
        axes.plot(x, low, marker, color=colour, fillstyle="none")
    axes.axhline(panel[0]["rounding_max"], color="#000000", linestyle=(0, (4, 2)), linewidth=1, label="one rounding")
    axes.set_yscale("log")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.grid(axis="y")


if __name__ == "__main__":
    main()
