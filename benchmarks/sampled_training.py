# SPDX-License-Identifier: Apache-2.0
"""Does sampling train as well? `python -m benchmarks.sampled_training` trains one small language model in several ways.

The model and the text (Python's standard library) are those of `examples/train_lm.py`, the vocabulary the first ids of
Qwen's. For each seed every way starts from the same weights and sees the same batches: exact gradients, sampled ones at
several thresholds, and, for comparison, gradients whose small entries are dropped, which is biased. Writes
`sampled_training.json` and `sampled_training.png` to `benchmarks/results/`. Needs the extras `bench` and `demo`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from examples.lm.data import Corpus
from examples.lm.model import LanguageModel
from rich.progress import track

from fastloss.torch import linear_cross_entropy

from . import machine, plot_style
from .report import console, number, print_rows

RESULTS = Path(__file__).resolve().parent / "results"
CLASSES, WIDTH, LAYERS, CONTEXT, BATCH = 16384, 128, 2, 128, 4
RATE, WARM_UP = 2e-3, 20
EVERY = 25  # steps between validations
CURVE_BATCHES, FINAL_BATCHES = 4, 24
DROPPED = 2.0**-12

HeadLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
Run = dict[str, Any]


class Dropping(torch.autograd.Function):
    """Cross-entropy whose gradient by the logits loses every entry below a threshold."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, threshold: float) -> torch.Tensor:
        logprobs = (hidden @ weight.T).log_softmax(1)
        loss = F.nll_loss(logprobs, target)
        gradient = logprobs.exp_()
        gradient[torch.arange(len(target)), target] -= 1
        gradient.masked_fill_(gradient.abs() < threshold, 0.0)
        ctx.save_for_backward(hidden, weight, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden, weight, gradient = ctx.saved_tensors
        scale = upstream[0] / len(hidden)
        return gradient @ weight * scale, gradient.T @ (hidden * scale), None, None


def dropping(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The biased way."""
    loss: torch.Tensor = Dropping.apply(hidden, weight, target, DROPPED)
    return loss


@dataclass(frozen=True)
class Way:
    """`timed`: it is made for speed, so that its seconds mean something."""

    name: str
    loss: HeadLoss
    colour: str
    timed: bool = True


def _sampled(exponent: int, colour: str) -> Way:
    return Way(f"sampled, 2^{exponent}", partial(linear_cross_entropy, backward="sampled", threshold=2.0**exponent), colour)


WAYS = (
    Way("exact", linear_cross_entropy, "#000000"),
    _sampled(-8, "#0072B2"),
    _sampled(-6, "#56B4E9"),
    _sampled(-4, "#009E73"),
    Way("dropped below 2^-12", dropping, "#D55E00", timed=False),
)


def main() -> None:
    """Trains, prints, and writes JSON and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default: benchmarks/results)")
    args = parser.parse_args()
    start = time.perf_counter()
    runs: list[Run] = []
    for seed in range(args.seeds):
        corpus = Corpus(4.0, CLASSES, seed)
        batches = [corpus.batch(BATCH, CONTEXT) for _ in range(args.steps)]
        validation = [corpus.validation_batches(BATCH, CONTEXT, count) for count in (CURVE_BATCHES, FINAL_BATCHES)]
        # In turns, so that a drift of the machine meets all ways alike.
        runs += [_train(way, seed, batches, *validation) for way in WAYS[seed:] + WAYS[:seed]]
    rows = [_summary(way, runs) for way in WAYS]
    _print(rows, args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sampled_training.json"
    description = machine.describe() | {"seconds": round(time.perf_counter() - start)}
    sizes = {"classes": CLASSES, "width": WIDTH, "layers": LAYERS, "tokens": BATCH * CONTEXT, "steps": args.steps}
    path.write_text(json.dumps({"machine": description, "sizes": sizes, "rows": rows, "runs": runs}, indent=1) + "\n")
    console.print(f"wrote {path} and {draw(path)}; {time.perf_counter() - start:.0f} s")


def _train(way: Way, seed: int, batches: list[Batch], curve: list[Batch], final: list[Batch]) -> Run:
    """One run: the validation loss every few steps, and the seconds of training up to there."""
    torch.manual_seed(seed)
    model = LanguageModel(CLASSES, WIDTH, LAYERS, CONTEXT)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    steps, seconds, losses = [0], [0.0], [_validate(model, curve)]
    times: list[float] = []
    for step, (ids, target) in enumerate(track(batches, f"{way.name}, seed {seed}", console=console), 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / WARM_UP)
        start = time.perf_counter()
        way.loss(model(ids), model.head, target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        if step % EVERY == 0 or step == len(batches):
            steps.append(step)
            seconds.append(sum(times))
            losses.append(_validate(model, curve))
    run: Run = {"way": way.name, "seed": seed, "steps": steps, "seconds": seconds, "curve": losses}
    return run | {"step_ms": 1e3 * statistics.median(times), "validation_loss": _validate(model, final)}


@torch.no_grad()
def _validate(model: LanguageModel, batches: list[Batch]) -> float:
    """Mean loss on held-out files, by PyTorch's formula for every way."""
    return statistics.fmean(
        float(F.cross_entropy(F.linear(model(ids), model.head), target.flatten())) for ids, target in batches
    )


def _summary(way: Way, runs: list[Run]) -> Run:
    """Mean over the seeds, and the distance from exact on the same seed, with its standard deviation."""
    of_way = {run["seed"]: run for run in runs if run["way"] == way.name}
    exact = {run["seed"]: run["validation_loss"] for run in runs if run["way"] == WAYS[0].name}
    distances = [run["validation_loss"] - exact[seed] for seed, run in of_way.items()]
    losses = [of_way[seed]["validation_loss"] for seed in sorted(of_way)]
    return {
        "way": way.name,
        "validation_losses": losses,
        "validation_loss": statistics.fmean(losses),
        "distance": statistics.fmean(distances),
        "distance_deviation": statistics.stdev(distances) if len(distances) > 1 else None,
        "step_ms": statistics.median(run["step_ms"] for run in of_way.values()) if way.timed else None,
    }


def _print(rows: list[Run], seeds: int) -> None:
    print_rows(
        f"validation loss after training, {seeds} seeds; {CLASSES} classes, width {WIDTH}, {BATCH * CONTEXT} tokens a step",
        rows,
        [
            ("gradient", lambda r: r["way"]),
            ("mean", lambda r: f"{r['validation_loss']:.4f}"),
            ("by seed", lambda r: " ".join(f"{loss:.3f}" for loss in r["validation_losses"])),
            ("from exact, same seed", lambda r: f"{r['distance']:+.4f}"),
            ("deviation", lambda r: "-" if r["distance_deviation"] is None else f"{r['distance_deviation']:.4f}"),
            ("ms a step", lambda r: number(r["step_ms"])),
        ],
    )


def draw(path: Path) -> Path:
    """Mean validation loss over steps, and over seconds where those mean something; bands from the least to the most."""
    result = json.loads(path.read_text())
    with plt.rc_context(plot_style.STYLE):
        figure, (over_steps, over_time) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
        for way, row in zip(WAYS, result["rows"], strict=True):
            runs = [run for run in result["runs"] if run["way"] == way.name]
            curves = list(zip(*(run["curve"] for run in runs), strict=True))
            low, mean, high = list(map(min, curves)), list(map(statistics.fmean, curves)), list(map(max, curves))
            steps = runs[0]["steps"]
            seconds = [statistics.fmean(times) for times in zip(*(run["seconds"] for run in runs), strict=True)]
            label = f"{way.name}: {row['validation_loss']:.3f}"
            over_steps.fill_between(steps, low, high, color=way.colour, alpha=0.1, linewidth=0)
            over_steps.plot(steps, mean, color=way.colour, label=label)
            if way.timed:
                over_time.plot(seconds, mean, color=way.colour, label=f"{way.name}: {row['step_ms']:.0f} ms a step")
        lowest = min(min(run["curve"]) for run in result["runs"])
        over_steps.set_ylim(lowest - 0.1, lowest + 3)
        over_steps.set_ylabel("validation loss (nats per token)")
        over_steps.set_xlabel(f"steps of {result['sizes']['tokens']} tokens")
        over_time.set_xlabel("seconds of training, without validation")
        for axes in (over_steps, over_time):
            axes.grid()
            axes.legend(fontsize=9)
        worst = max(abs(row["distance"]) for row in result["rows"] if row["way"].startswith("sampled"))
        dropped = result["rows"][-1]["distance"]
        title = f"Sampled gradients end within {worst:.3f} of exact ones, dropped ones {dropped:.2f} above"
        figure.suptitle(title, x=0.01, ha="left")
        plot_style.add_caption(figure, result["machine"])
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        png = path.with_suffix(".png")
        figure.savefig(png)
        plt.close(figure)
    return png


if __name__ == "__main__":
    main()
