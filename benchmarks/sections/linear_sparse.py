# SPDX-License-Identifier: Apache-2.0
"""What a row-sparse gradient of the weight buys: memory, and time of a training step with each optimizer."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastloss.torch import linear_cross_entropy

from ..jobs import Job
from ..linear.case import LinearCase
from ..linear.jobs import LossAndGradients
from ..peers.linear import SAMPLED
from ..report import Section, number, print_rows
from ..settings import Settings
from ..timing import interleave

SHAPE = (1024, 128256, 1024)
THRESHOLDS = (2.0**-6, 2.0**-4)
OPTIMIZERS = {"SGD": (torch.optim.SGD, torch.optim.SGD), "Adam": (torch.optim.Adam, torch.optim.SparseAdam)}  # dense, sparse
ROUNDS = 5
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
Row = dict[str, Any]


class Untrained(LinearCase):
    """The logits of `torch.nn.Linear` as it is initialised, with a standard deviation of 0.58."""

    scale = 1 / math.sqrt(3)
    odds = 0.0


class Confident(LinearCase):
    """Every target has a probability of about 0.99."""

    every = 1
    odds = 99.0


LOGITS = {"untrained": Untrained, "half the targets at 0.5": LinearCase, "all targets at 0.99": Confident}


class Step(Job):
    """One step of an optimizer, too short to change a weight: each run does the same work."""

    def __init__(self, kind: Any, weight: torch.Tensor) -> None:
        self.weight, self.gradient = weight, weight.grad
        self.optimizer = kind([weight], lr=1e-12)

    def prepare(self) -> None:
        self.weight.grad = self.gradient

    def run(self) -> None:
        self.optimizer.step()

    def release(self) -> None:
        self.weight.grad = None


def measure(settings: Settings) -> Section:
    """Loss and gradients, then the step of the weight, dense and sparse in the same rounds."""
    section = Section("linear-sparse", "sampled backward with a dense and a row-sparse gradient of the weight, float32")
    section.notes = [
        "Milliseconds of loss and gradients, alone and with a step of the weight: SGD, and Adam or SparseAdam, which leaves",
        "the moments of rows without an entry as they are. `dense /` is the time with a dense gradient over this one.",
        "Freed memory is kept here, or the page faults of the optimizers' temporaries would be most of their time.",
    ]
    shrink = 4 if settings.quick else 1
    for logits, kind in LOGITS.items():
        case = kind(SHAPE[0] // shrink, SHAPE[1] // shrink, SHAPE[2], "float32")
        for threshold in THRESHOLDS:
            with _freed_memory_is_kept():
                section.rows += [row | {"logits": logits} for row in _measure(case, threshold)]
    print_rows(
        f"{section.title}: {SHAPE[0] // shrink} x {SHAPE[1] // shrink} x {SHAPE[2]}",
        section.rows,
        [
            ("logits", lambda r: r["logits"]),
            ("threshold", lambda r: f"1/{1 / r['threshold']:.0f}"),
            ("gradient", lambda r: r["gradient"]),
            ("MB", lambda r: number(r["gradient_mb"])),
            *((name, partial(_milliseconds, key=key)) for name, key in COLUMNS.items()),
            *((f"dense / {name}", partial(_ratio, rows=section.rows, key=key)) for name, key in COLUMNS.items()),
        ],
    )
    return section


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Makes malloc of the GNU C library serve large blocks from its heap, and give none of it back."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


COLUMNS = {"loss": "ms", "+ SGD": "ms_sgd", "+ Adam": "ms_adam"}


def _milliseconds(row: Row, key: str) -> str:
    return "wrong" if "wrong" in row else number(row[key])


def _ratio(row: Row, rows: list[Row], key: str) -> str:
    if row["gradient"] == "dense" or "wrong" in row:
        return ""
    dense = next(r for r in rows if (r["logits"], r["threshold"], r["gradient"]) == (row["logits"], row["threshold"], "dense"))
    return f"{number(dense[key] / row[key])}x"


def _measure(case: LinearCase, threshold: float) -> list[Row]:
    jobs: dict[str, Job] = {}
    gradients: list[torch.Tensor] = []
    for place, gradient in enumerate(("dense", "sparse")):
        sampled = partial(linear_cross_entropy, backward="sampled", threshold=threshold, seed=0, sparse=gradient == "sparse")
        job = LossAndGradients(sampled, case)
        job.run()
        gradients.append(job.gradients()[1])
        jobs[gradient] = job
        for name, kinds in OPTIMIZERS.items():
            step = jobs[f"{gradient} {name}"] = Step(kinds[place], job.weight)
            step.run()  # makes its moments
        job.release()
    dense, sparse = gradients
    ids, values = sparse._indices()[0], sparse._values()
    row = {"peer": SAMPLED, "shape": list(case.shape), "threshold": threshold}
    rows = [
        row | {"gradient": "dense", "gradient_mb": dense.nbytes / 1e6},
        row | {"gradient": "sparse", "gradient_mb": (ids.nbytes + values.nbytes) / 1e6, "classes": len(ids)},
    ]
    if not torch.equal(dense[ids], values) or torch.count_nonzero(dense) != torch.count_nonzero(values):
        return [row | {"wrong": "the gradients differ"} for row in rows]
    timings = interleave(jobs, ROUNDS)
    for row in rows:
        loss, *steps = (timings[key].median * 1e3 for key in jobs if key.split()[0] == row["gradient"])
        row |= {"ms": loss} | {f"ms_{name.lower()}": loss + ms for name, ms in zip(OPTIMIZERS, steps, strict=True)}
    return rows
