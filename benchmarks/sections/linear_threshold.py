# SPDX-License-Identifier: Apache-2.0
"""What the threshold of the sampled backward buys: time, entries kept, and the variance of the gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastloss.torch import linear_cross_entropy

from ..linear import check
from ..linear.case import LinearCase
from ..linear.compare import FORWARD_PRODUCT
from ..linear.jobs import LossAndGradients, Product, products
from ..peers.linear import EXACT, SAMPLED, SAMPLED_BOUNDS
from ..report import Section, number, print_rows
from ..settings import Settings
from ..timing import interleave

SHAPE = (1024, 128256, 1024)
EXPONENTS = range(-12, -1)
SEEDS = 2
ROUNDS = 3
Row = dict[str, Any]


def measure(settings: Settings) -> Section:
    """Every power of two from 2^-12 to 2^-2, with the exact backward and the bare product in the same rounds."""
    section = Section("linear-threshold", "threshold of the sampled backward: time, entries, variance, float32")
    section.notes = [
        "Relative variance: the squared distance of a sampled gradient from the exact one over the square of the exact one,",
        f"by hidden states and by weights, mean of {SEEDS} seeds.",
    ]
    shrink = 4 if settings.quick else 1
    case = LinearCase(SHAPE[0] // shrink, SHAPE[1] // shrink, SHAPE[2], "float32")
    exact = LossAndGradients(linear_cross_entropy, case)
    exact.run()
    expected = [gradient.clone() for gradient in exact.gradients()]
    exact.release()
    jobs: dict[str, LossAndGradients | Product] = {EXACT: exact, FORWARD_PRODUCT: _forward_product(case)}
    for exponent in EXPONENTS:
        row = {"peer": SAMPLED, "exponent": exponent, "threshold": 2.0**exponent, "shape": list(case.shape)}
        sampled = partial(linear_cross_entropy, backward="sampled", threshold=2.0**exponent)
        job = LossAndGradients(sampled, case)
        row |= _quality(case, sampled, expected)
        section.rows.append(row)
        if "wrong" not in row:
            jobs[f"2^{exponent}"] = job
    del expected
    timings = interleave(jobs, ROUNDS)
    for row in section.rows:
        if "wrong" not in row:
            row["ms"] = timings[f"2^{row['exponent']}"].median * 1e3
    marks = [{"peer": name, "shape": list(case.shape), "ms": timings[name].median * 1e3} for name in (EXACT, FORWARD_PRODUCT)]
    section.rows += marks
    print_rows(
        f"{section.title}: {' x '.join(map(str, case.shape))}",
        section.rows,
        [
            ("threshold", lambda r: f"2^{r['exponent']}" if "exponent" in r else r["peer"]),
            ("ms", lambda r: "wrong" if "wrong" in r else number(r["ms"])),
            ("entries a token", lambda r: number(r.get("entries"))),
            ("relative variance, hidden", lambda r: number(r.get("variance_hidden"))),
            ("weights", lambda r: number(r.get("variance_weight"))),
        ],
    )
    return section


def _forward_product(case: LinearCase) -> Product:
    """The fastest of the ways to make the logits."""
    ways = {key: job for key, job in products(case).items() if key[0] == "logits"}
    for job in ways.values():
        job.run()
    timings = interleave({str(key): job for key, job in ways.items()}, 1)
    return ways[min(ways, key=lambda key: timings[str(key)].median)]


def _quality(case: LinearCase, sampled: Any, expected: list[torch.Tensor]) -> Row:
    """Entries kept and variances; `wrong` if the loss or the mean of the gradients is off."""
    entries = 0
    variances = torch.zeros(2, dtype=torch.float64)
    for seed in range(SEEDS):
        job = LossAndGradients(partial(sampled, seed=seed), case)
        job.loss = job.function(job.hidden, job.weight, job.target)
        entries += job.loss.grad_fn.saved_tensors[-1].numel()  # type: ignore[union-attr]
        job.loss.backward()
        errors = check.measure(job, case, sampled=True)
        if not errors.within(SAMPLED_BOUNDS[case.dtype]):
            return {"wrong": str(errors)}
        variances += torch.stack([_relative_variance(*pair) for pair in zip(job.gradients(), expected, strict=True)])
        job.release()
    by_hidden, by_weight = (variances / SEEDS).tolist()
    return {"entries": entries / SEEDS / case.tokens, "variance_hidden": by_hidden, "variance_weight": by_weight}


def _relative_variance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return ((found - expected).norm().double() / expected.norm().double()).square()
