# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy on a GPU: time and peak memory of the loss and both gradients, beside those who offer the same.

Logits have standard deviation 2 and targets are random: no probability is large, which is the most that sampling ever keeps.
Answers are checked at full size against float64: the loss, and some rows of each gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_peers import LINEAR_PEERS, LinearLoss
from benchmarks.gpu_timing import Job, Jobs, interleave, kernels_of

ROUNDS = 15
CHECKED_ROWS = 64
LOSS_TOLERANCE = 2e-2  # relative: eager rounds it to 16 bits
GRADIENT_TOLERANCE = 5e-2  # of the length of the rows that are checked
OURS = ("fastloss exact", "fastloss sampled")
SHOWN_MS = 0.02
# A sample is random: how far from 1 its part along the exact gradient may be.
BIAS_TOLERANCE = 1e-1


class LinearCase(NamedTuple):
    """Sizes; bfloat16."""

    tokens: int
    features: int
    classes: int

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"linear {self.tokens} x {self.features} x {self.classes} bfloat16"

    @property
    def flops(self) -> float:
        """Of the three products."""
        return 6.0 * self.tokens * self.features * self.classes


CASES = (LinearCase(4096, 4096, 128256), LinearCase(8192, 2304, 256000))


class Factors(NamedTuple):
    """What a loss is made of."""

    hidden: Tensor
    weight: Tensor
    target: Tensor


class Truth(NamedTuple):
    """In float64: the loss, and of each gradient the first CHECKED_ROWS rows."""

    loss: float
    by_hidden: Tensor
    by_weight: Tensor


def run(cases: tuple[LinearCase, ...], seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Prints a table a case, and yields its rows."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > seconds:
            print(f"{case.name}: left out, {seconds:.0f} s are over")
            continue
        needed = 8 * case.classes * (2 * case.features + case.tokens // 8)
        if needed > torch.cuda.mem_get_info()[0]:
            print(f"{case.name}: left out, too little memory")
            continue
        found = measure(case)
        print_table(case, found)
        torch.cuda.empty_cache()
        yield found


def measure(case: LinearCase) -> list[dict[str, Any]]:
    """One row a peer."""
    factors = factors_of(case)
    truth = truth_of(factors)
    jobs: Jobs = {}
    rows: dict[str, dict[str, Any]] = {}
    for peer, make in LINEAR_PEERS.items():
        row = rows[peer] = {"case": case.name, "peer": peer}
        try:
            function = make()
            loss_and_gradients(function, factors)  # whatever is compiled or tuned
            row["peak_gb"] = peak_bytes(function, factors) / 1e9
            check(function, factors, truth, sampled="sampled" in peer)
            jobs["linear", peer] = Job(partial(loss_and_gradients, function, factors))
        except ImportError as error:
            row["missing"] = str(error)
        except (NotImplementedError, RuntimeError, AssertionError, TypeError, ValueError) as error:
            row["wrong"] = f"{type(error).__name__}: {error}"[:300]
    times = interleave(jobs, ROUNDS)
    ours = times.get(("linear", "fastloss exact"))
    for (_, peer), elapsed in times.items():
        rows[peer] |= {
            "ms": elapsed * 1e3,
            "tflops": case.flops / elapsed / 1e12,
            "times_fastloss": elapsed / (ours or elapsed),
        }
    return list(rows.values())


def factors_of(case: LinearCase) -> Factors:
    """Random ones, always the same."""
    torch.manual_seed(0)
    factors = Factors(
        torch.randn(case.tokens, case.features, dtype=torch.bfloat16, device="cuda"),
        torch.randn(case.classes, case.features, dtype=torch.bfloat16, device="cuda") * (2 / math.sqrt(case.features)),
        torch.randint(case.classes, (case.tokens,), device="cuda"),
    )
    factors.target[:CHECKED_ROWS] = torch.arange(CHECKED_ROWS, device="cuda")  # so that the checked classes have targets
    return factors


def kernels(cases: tuple[LinearCase, ...]) -> list[dict[str, Any]]:
    """Where fastloss's time goes, printed as tables. After all that is timed: a profiler may slow down what comes behind it."""
    rows = []
    for case in cases:
        factors = factors_of(case)
        for peer in OURS:
            work = partial(loss_and_gradients, LINEAR_PEERS[peer](), factors)
            work()
            print(f"\n{case.name}, {peer}\n{'kernel':<60}{'calls':>6}{'ms':>9}")
            for kernel in kernels_of(work):
                rows.append({"case": case.name, "peer": peer, **kernel._asdict()})
                if kernel.ms >= SHOWN_MS:
                    print(f"{kernel.name[:59]:<60}{kernel.calls:6}{kernel.ms:9.3f}")
    return rows


def loss_and_gradients(function: LinearLoss, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The timed work."""
    hidden, weight = (factor.detach().requires_grad_() for factor in factors[:2])
    loss = function(hidden, weight, factors.target)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), by_hidden, by_weight


def peak_bytes(function: LinearLoss, factors: Factors) -> int:
    """Of the work, gradients included, beside what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_and_gradients(function, factors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def truth_of(factors: Factors) -> Truth:
    """The float64 answer, logits of some tokens at a time."""
    hidden, weight, target = factors
    wide, tokens = weight.double(), len(hidden)
    total, by_hidden, by_weight = 0.0, None, torch.zeros_like(wide[:CHECKED_ROWS])
    for begin in range(0, tokens, tokens // 8):
        part = slice(begin, begin + tokens // 8)
        gradient = hidden[part].double() @ wide.T
        log_sum = torch.logsumexp(gradient, 1, keepdim=True)
        total += float((log_sum - gradient.gather(1, target[part, None])).sum())
        gradient.sub_(log_sum).exp_()
        gradient.scatter_add_(1, target[part, None], torch.full_like(log_sum, -1.0))
        by_weight += gradient[:, :CHECKED_ROWS].T @ hidden[part].double()
        if by_hidden is None:
            by_hidden = gradient[:CHECKED_ROWS] @ wide
    assert by_hidden is not None
    return Truth(total / tokens, by_hidden / tokens, by_weight / tokens)


def check(function: LinearLoss, factors: Factors, truth: Truth, sampled: bool) -> None:
    """Raises AssertionError where loss or gradients are off."""
    loss, *gradients = loss_and_gradients(function, factors)
    assert abs(float(loss) / truth.loss - 1) <= LOSS_TOLERANCE, f"loss {float(loss)}, not {truth.loss}"
    for name, gradient, exact in zip(("hidden", "weight"), gradients, truth[1:], strict=True):
        distance = gradient[:CHECKED_ROWS].double() - exact
        if sampled:
            error, limit = abs(float((distance * exact).sum() / exact.square().sum())), BIAS_TOLERANCE
        else:
            error, limit = float(distance.norm() / exact.norm()), GRADIENT_TOLERANCE
        assert error <= limit, f"gradient by {name} off by {error:.1e}"


def print_table(case: LinearCase, rows: list[dict[str, Any]]) -> None:
    """One line a peer."""
    print(f"\n{case.name}\n{'peer':<20}{'ms':>9}{'TFLOP/s':>9}{'peak GB':>9}{'/ fastloss':>11}")
    for row in rows:
        if "ms" not in row:
            print(f"{row['peer']:<20}{row.get('wrong', row.get('missing'))}")
            continue
        print(f"{row['peer']:<20}{row['ms']:9.3f}{row['tflops']:9.0f}{row['peak_gb']:9.2f}{row['times_fastloss']:11.2f}")
