# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu`: losses and gradients on this machine's GPU, beside the bandwidth of a copy in the same run.

Every answer is checked against float64 first. Times are medians of CUDA events over rounds in which each peer runs once. Linear
cross-entropy, which is arithmetic rather than bandwidth, follows (`gpu_linear.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastloss.torch
from benchmarks import gpu_linear
from benchmarks.gpu_peers import PEERS, LossFunction
from benchmarks.gpu_timing import Job, Jobs, interleave

RESULTS = Path(__file__).parent / "results"
# Rows whose gradient is checked, and how far off the loss (relative) and gradient entries (of the largest one) may be.
CHECKED_ROWS = 64
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
# Passes over the logits: what the operation must move, in units of their bytes.
OVERWRITES = ("gradient in place", "gradient in place, in backward")
UNITS = {"loss": 1, "gradient": 2, OVERWRITES[0]: 2, OVERWRITES[1]: 3, "logprob and entropy": 1}


class Case(NamedTuple):
    """Logits with classes in dimension 1."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"{' x '.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        """Of the logits."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


CASES = (
    Case((16384, 131072), torch.bfloat16),
    Case((8192, 262144), torch.bfloat16),
    Case((8192, 151936), torch.bfloat16),
    Case((8192, 131072), torch.float32),
    Case((8, 150, 256, 256), torch.bfloat16),
)


def main() -> None:
    """Prints tables, writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--seconds", type=float, default=75, help="no new case is begun after so long")
    parser.add_argument("--linear-seconds", type=float, default=40, help="the same for linear cross-entropy")
    arguments = parser.parse_args()
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = RESULTS / f"cuda-{gpu}.json"
    results: dict[str, Any] = {"machine": machine(), "rows": [], "linear": [], "kernels": []}
    for found in run(CASES[: arguments.cases], arguments.seconds):
        write(results, "rows", found, path)
    for found in gpu_linear.run(gpu_linear.CASES[: arguments.cases], arguments.linear_seconds):
        write(results, "linear", found, path)
    measured = {row["case"] for row in results["linear"]}
    write(results, "kernels", gpu_linear.kernels(tuple(case for case in gpu_linear.CASES if case.name in measured)), path)
    try:
        from benchmarks import gpu_plots
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        gpu_plots.draw(results, path)


def write(results: dict[str, Any], section: str, found: list[dict[str, Any]], path: Path) -> None:
    """Adds the rows of a case and writes all, since `make gpu` ends a run that takes too long."""
    results[section] += found
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")


def run(cases: tuple[Case, ...], seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Prints a table a case, and yields its rows."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > seconds:
            print(f"{case.name}: left out, {seconds:.0f} s are over")
            continue
        if 5 * case.nbytes > torch.cuda.mem_get_info()[0]:
            print(f"{case.name}: left out, too little memory")
            continue
        found = measure(case)
        print_table(case, found)
        yield found


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "build": fastloss.build_info()["cuda"],
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def measure(case: Case) -> list[dict[str, Any]]:
    """One row for each operation of each peer that answers rightly, and the copy."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(case.shape, dtype=case.dtype, device="cuda")
    target = torch.randint(case.shape[1], (case.shape[0], *case.shape[2:]), device="cuda")
    work = torch.empty_like(logits)  # what is overwritten; filled again before each run
    truth = truth_of(logits, target)
    jobs: Jobs = {}
    rows: list[dict[str, Any]] = []
    for peer, make in PEERS.items():
        try:
            operations = make()
        except ImportError as error:
            rows.append({"case": case.name, "peer": peer, "missing": str(error)})
            continue
        for operation, function in operations.items():
            wrong = what_is_wrong(function, operation, logits, work, target, truth)
            if wrong:
                rows.append({"case": case.name, "peer": peer, "operation": operation, "wrong": wrong})
            else:
                jobs[operation, peer] = job(function, operation, logits, work, target)
    jobs["logprob and entropy", "fastloss"] = Job(
        lambda: fastloss.torch.logit_stats(logits, target, dim=1, want=("logprob", "entropy"))
    )
    jobs["copy", "copy"] = Job(lambda: work.copy_(logits))
    times = interleave(jobs)
    copy = 2 * case.nbytes / times["copy", "copy"]
    for (operation, peer), seconds in times.items():
        rate = UNITS.get(operation, 2) * case.nbytes / seconds
        rows.append(
            {
                "case": case.name,
                "peer": peer,
                "operation": operation,
                "ms": seconds * 1e3,
                "gb_per_s": rate / 1e9,
                "percent_of_copy": 100 * rate / copy,
                "times_fastloss": seconds / times.get((operation, "fastloss"), seconds),
            }
        )
    return rows


def job(function: LossFunction, operation: str, logits: Tensor, work: Tensor, target: Tensor) -> Job:
    """The timed work."""

    def loss() -> object:
        with torch.no_grad():
            return function(logits, target)

    def gradient() -> None:
        leaf = logits.detach().requires_grad_()
        function(leaf, target).backward()

    def in_place() -> None:
        leaf = work.detach().requires_grad_()
        function(Overwritten.apply(leaf), target).backward()

    if operation in OVERWRITES:
        return Job(in_place, lambda: work.copy_(logits))
    return Job(loss if operation == "loss" else gradient)


class Overwritten(torch.autograd.Function):
    """Stands for the matmul that makes logits: the same memory as a non-leaf; the gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        """Gives out the memory of the leaf."""
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        """Drops the gradient."""
        return


class Truth(NamedTuple):
    """In float64: the loss, and the gradient of the first rows."""

    loss: float
    gradient: Tensor


def truth_of(logits: Tensor, target: Tensor) -> Truth:
    """Some rows at a time."""
    step = CHECKED_ROWS if logits.ndim == 2 else 1
    total = 0.0
    for begin in range(0, len(logits), step):
        part = slice(begin, begin + step)
        total += float(torch.nn.functional.cross_entropy(logits[part].double(), target[part], reduction="sum"))
    exact = logits[:step].double().requires_grad_()
    (torch.nn.functional.cross_entropy(exact, target[:step], reduction="sum") / target.numel()).backward()
    assert exact.grad is not None
    return Truth(total / target.numel(), exact.grad)


def what_is_wrong(
    function: LossFunction, operation: str, logits: Tensor, work: Tensor, target: Tensor, truth: Truth
) -> str | None:
    """How the loss, or the gradient of a few rows, is off, or what the peer says; None where it answers rightly."""
    try:
        check(function, operation, logits, work, target, truth)
    except (NotImplementedError, RuntimeError, AssertionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def check(function: LossFunction, operation: str, logits: Tensor, work: Tensor, target: Tensor, truth: Truth) -> None:
    """Raises AssertionError where loss or gradient are off."""
    grad = None
    if operation == "loss":
        loss = function(logits, target)
    elif operation == "gradient":
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, target)
        loss.backward()
        grad = leaf.grad
    else:
        work.copy_(logits)
        non_leaf = Overwritten.apply(work.detach().requires_grad_())
        non_leaf.retain_grad()
        loss = function(non_leaf, target)
        loss.backward()
        grad = non_leaf.grad
    assert abs(loss.item() / truth.loss - 1) <= LOSS_TOLERANCE[logits.dtype], f"loss {loss.item()}, not {truth.loss}"
    if grad is not None:
        distance = grad[: len(truth.gradient)].double() - truth.gradient
        error = float(distance.abs().max() / truth.gradient.abs().max())
        assert error <= GRADIENT_TOLERANCE[logits.dtype], f"gradient off by {error:.1e} of its largest entry"


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    print(f"\n{case.name}\n{'operation':<22}{'peer':<16}{'ms':>9}{'GB/s':>8}{'% copy':>8}{'/ fastloss':>11}")
    for row in rows:
        if "ms" not in row:
            print(f"{row.get('operation', ''):<22}{row['peer']:<16}{row.get('wrong', row.get('missing'))}")
            continue
        print(
            f"{row['operation']:<22}{row['peer']:<16}{row['ms']:9.3f}{row['gb_per_s']:8.0f}{row['percent_of_copy']:8.1f}"
            f"{row['times_fastloss']:11.2f}"
        )


if __name__ == "__main__":
    main()
