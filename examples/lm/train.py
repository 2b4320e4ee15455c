# SPDX-License-Identifier: Apache-2.0
"""One training run with one loss, in this process: progress on the screen, result as JSON."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastloss

from . import memory
from .config import Config
from .data import Corpus
from .losses import LOSSES, HeadLoss
from .model import LanguageModel
from .stopwatch import Stopwatch

WARM_UP = 3  # steps that compile, start threads and allocate the optimiser's state; trained on, but not timed
VALIDATION_BATCHES = 12


def train(name: str, config: Config, out: Path) -> None:
    """Trains from the seed and writes `out/<name>.json`."""
    corpus = Corpus(config.text_mb, config.vocab, config.seed)
    torch.manual_seed(config.seed)
    model = LanguageModel(corpus.classes, config.width, config.layers, config.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    loss_function = LOSSES[name].make(config)
    dtype = getattr(torch, config.dtype)

    losses: list[float] = []
    times: list[float] = []
    watches: list[Stopwatch] = []
    warm_up = min(WARM_UP, config.steps - 1)
    standing = 0
    figures = TextColumn("{task.fields[figures]}")
    with Progress("{task.description}", BarColumn(8), MofNCompleteColumn(), TimeRemainingColumn(), figures) as progress:
        task = progress.add_task(f"{name:14s}", total=config.steps, figures="compiling" if name == "compile" else "")
        for step in range(config.steps):
            if step == warm_up:
                fastloss.release_memory()  # what it keeps for the next gradient belongs to the steps
                standing = memory.resident()
                memory.reset_peak()
            ids, target = corpus.batch(config.batch, config.context)
            watch = Stopwatch()
            start = time.perf_counter()
            loss = _forward(model, loss_function, ids, target, dtype, watch)
            watch.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
            schedule.step()
            watches.append(watch)
            losses.append(float(loss.detach()))
            progress.update(task, advance=1, figures=_figures(losses, times, config.tokens))
    peak = memory.peak()

    watches = watches[warm_up:]
    result = {
        "loss": name,
        "title": LOSSES[name].title,
        "sampled": LOSSES[name].sampled,
        "classes": corpus.classes,
        "tokens": config.tokens,
        "dtype": config.dtype,
        "width": config.width,
        "threads": torch.get_num_threads(),
        "losses": losses,
        "step_seconds": statistics.median(times[warm_up:]),
        "loss_seconds": statistics.median(watch.loss_seconds for watch in watches),
        "head_seconds": statistics.median(watch.head_seconds for watch in watches),
        "standing_bytes": standing,
        "peak_bytes": peak,
        "validation_loss": validate(model, corpus, config),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result))


def _forward(
    model: LanguageModel,
    loss_function: HeadLoss,
    ids: torch.Tensor,
    target: torch.Tensor,
    dtype: torch.dtype,
    watch: Stopwatch,
) -> torch.Tensor:
    hidden = model(ids)
    return watch.head(hidden, lambda: loss_function(hidden.to(dtype), model.head.to(dtype), target.flatten(), watch))


@torch.no_grad()
def validate(model: LanguageModel, corpus: Corpus, config: Config) -> float:
    """Mean loss on the held-out files, by the same float32 formula for every run."""
    batches = corpus.validation_batches(config.batch, config.context, VALIDATION_BATCHES)
    losses = [float(F.cross_entropy(F.linear(model(ids), model.head), target.flatten())) for ids, target in batches]
    return statistics.fmean(losses)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the rate."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def _figures(losses: list[float], times: list[float], tokens: int) -> str:
    recent = statistics.fmean(losses[-10:])
    speed = tokens / statistics.median(times[-10:])
    return f"loss {recent:6.3f}  ppl {math.exp(min(recent, 20)):8.1f}  {speed:5.0f} tok/s"  # 80 columns in all
