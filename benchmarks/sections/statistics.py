# SPDX-License-Identifier: Apache-2.0
"""Entropy and top-1 in the same pass as the loss."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..cases import Case
from ..jobs import Job
from ..report import Goal, Section, number, print_rows
from ..settings import Settings
from ..timing import interleave

LOSS = ("logprob", "logsumexp")
MORE = ("logprob", "logsumexp", "entropy", "argmax")


class Statistics(Job):
    """`fastloss.torch.logit_stats` without autograd."""

    def __init__(self, case: Case, want: tuple[str, ...]) -> None:
        import fastloss.torch

        self.function, self.case, self.want = fastloss.torch.logit_stats, case, want

    def run(self) -> None:
        with torch.no_grad():
            self.result: Any = self.function(self.case.logits, self.case.target, want=self.want)


class EagerStatistics(Job):
    """The same four figures in plain PyTorch."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def run(self) -> None:
        with torch.no_grad():
            logits, target = self.case.logits, self.case.target
            logprobs = torch.log_softmax(logits, -1)
            chosen = logprobs.gather(1, target.unsqueeze(1)).squeeze(1)
            self.result = chosen, logits.logsumexp(-1), -(logprobs.exp() * logprobs).sum(-1), logits.argmax(-1)


def measure(settings: Settings) -> Section:
    """Time of the loss's statistics alone, and with entropy and argmax."""
    section = Section("statistics", "entropy and top-1 in the same pass")
    classes = 128256
    for dtype in ("float32", "bfloat16"):
        case = Case((settings.rows(classes), classes), dtype)
        jobs: dict[str, Job] = {"eager, all four": EagerStatistics(case)}
        if "fastloss" in settings.peers:
            jobs = {", ".join(LOSS): Statistics(case, LOSS), ", ".join(MORE): Statistics(case, MORE)} | jobs
        wrong = set()
        for name, job in jobs.items():
            job.run()
            if isinstance(job, Statistics) and not _right(job, case):
                wrong.add(name)
        timings = interleave(jobs, settings.rounds, frozenset(["eager, all four"]))
        rows: list[dict[str, Any]] = [
            {"peer": name, "dtype": dtype, "shape": list(case.shape), "ms": t.median * 1e3}
            | ({"wrong": True} if name in wrong else {})
            for name, t in timings.items()
        ]
        print_rows(
            f"statistics: {case.rows} x {classes} {dtype}",
            rows,
            [("statistics", lambda r: r["peer"]), ("ms", lambda r: "wrong" if r.get("wrong") else number(r["ms"]))],
        )
        section.rows += rows
        more = None
        if "fastloss" in settings.peers and not wrong:
            more = 100 * (timings[", ".join(MORE)].median / timings[", ".join(LOSS)].median - 1)
        section.goals.append(Goal(f"entropy and argmax cost, {dtype}", more, 15.0, False, "% more"))
    return section


def _right(job: Statistics, case: Case) -> bool:
    """Compares every 97th row with float64."""
    rows = slice(None, None, 97)
    z = case.logits[rows].double()
    lse = z.logsumexp(-1)
    logprob = z.gather(1, case.target[rows].unsqueeze(1)).squeeze(1) - lse
    expected = {"logprob": logprob, "logsumexp": lse, "argmax": z.argmax(-1)}
    expected["entropy"] = lse - (z.softmax(-1) * z).sum(-1)
    for name in job.want:
        found = getattr(job.result, name)[rows]
        if name == "argmax":
            # Equal logits are common in bfloat16: any place of the maximum will do.
            found, wanted = z.gather(1, found.unsqueeze(1)).squeeze(1), z.amax(-1)
        else:
            wanted = expected[name]
        error = float((found.double() - wanted).abs().max())
        if not (math.isfinite(error) and error <= 1e-4):
            return False
    return True
