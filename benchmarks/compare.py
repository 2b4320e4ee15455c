# SPDX-License-Identifier: Apache-2.0
"""The comparison behind most sections: all peers on one case, answers checked, then timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import check
from .cases import Case
from .jobs import Job, Unsupported
from .peers import Peer
from .peers.stream import READ, UPDATE
from .report import Column, console, number, print_rows
from .timing import Timing, interleave

Row = dict[str, Any]


def compare_all(case: Case, peers: Mapping[str, Peer], operations: Sequence[str], rounds: int) -> list[Row]:
    """Returns one row for each peer that knows one of the operations; whoever answers wrongly is not timed."""
    jobs: dict[str, Job] = {}
    errors: dict[str, check.Errors | None] = {}
    wrong: list[Row] = []
    timings: dict[str, Timing] = {}
    for apart in (False, True):
        chosen = [peer for peer in peers.values() if peer.apart == apart]
        ready = _check_all(chosen, case, operations, errors, wrong)
        timings |= interleave(ready, rounds, frozenset(name for name in ready if peers[name].slow))
        jobs |= ready
    return [_row(case, name, errors[name], jobs[name], timings) for name in peers if name in jobs] + wrong


def _check_all(
    peers: Sequence[Peer], case: Case, operations: Sequence[str], errors: dict[str, check.Errors | None], wrong: list[Row]
) -> dict[str, Job]:
    """Returns the jobs that answer rightly; notes their errors, and the rows of those that do not."""
    jobs: dict[str, Job] = {}
    for peer in peers:
        operation = next((name for name in operations if name in peer.jobs), None)
        if operation is None:
            continue
        try:
            job = peer.jobs[operation](case)
            errors[peer.name] = _check(job, peer, case)
        except Unsupported:
            continue
        except (
            WrongAnswer,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            wrong.append(_row(case, peer.name, None) | {"wrong": f"{type(error).__name__}: {error}"})
            continue
        jobs[peer.name] = job
    return jobs


class WrongAnswer(Exception):
    """A loss or gradient outside the bound of its peer."""


def _check(job: Job, peer: Peer, case: Case) -> check.Errors | None:
    """Runs the job once; returns its errors, None for what computes no loss."""
    bound = peer.bounds.get(case.dtype)
    if bound is None:
        job.prepare()
        job.run()
        job.release()
        return None
    errors = check.measure(job, case)
    if not errors.within(bound):
        raise WrongAnswer(f"{errors}, where {bound} is allowed")
    return errors


def _row(
    case: Case,
    peer: str,
    errors: check.Errors | None,
    job: Job | None = None,
    timings: Mapping[str, Timing] | None = None,
) -> Row:
    row: Row = {
        "peer": peer,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "rows": case.rows,
        "classes": case.classes,
    }
    if errors is not None:
        row |= {"loss_error": errors.loss, "gradient_error": errors.gradient}
    if job is None or timings is None:
        return row
    timing = timings[peer]
    traffic = (job.floor_reads + 2 * job.floor_updates) * case.nbytes
    row |= {
        "ms": timing.median * 1e3,
        "ms_low": timing.low * 1e3,
        "ms_high": timing.high * 1e3,
        "samples": timing.samples,
        "gb_per_s": traffic / timing.median / 1e9,
        "percent_of_stream": _percent_of_stream(job, timing, timings),
    }
    for ours in ("fastloss", "fastloss in place"):
        if ours in timings:
            row[f"{ours} is faster by"] = timing.median / timings[ours].median
    return row


def _percent_of_stream(job: Job, timing: Timing, timings: Mapping[str, Timing]) -> float | None:
    """100 x the time that this job's passes take at the stream bandwidth / the time it took."""
    needed = 0.0
    for passes, stream in ((job.floor_reads, READ), (job.floor_updates, UPDATE)):
        if passes and stream not in timings:
            return None
        needed += passes * timings[stream].median if passes else 0.0
    return 100 * needed / timing.median


def ratio(rows: Sequence[Row], peer: str, ours: str, **where: Any) -> float | None:
    """Time of the peer over ours, among the rows that match; None where either is missing."""
    times = {row["peer"]: row["ms"] for row in rows if "ms" in row and all(row[key] == value for key, value in where.items())}
    return times[peer] / times[ours] if peer in times and ours in times else None


def value(rows: Sequence[Row], peer: str, key: str, **where: Any) -> float | None:
    """One figure of one peer, None where it is missing."""
    for row in rows:
        if row["peer"] == peer and all(row[name] == wanted for name, wanted in where.items()):
            return row.get(key)
    return None


def print_comparison(title: str, rows: Sequence[Row]) -> None:
    """Prints one table of `compare_all`."""
    columns: list[Column] = [
        ("peer", lambda r: r["peer"]),
        ("ms", lambda r: "wrong" if "wrong" in r else number(r["ms"])),
        ("quartiles", lambda r: f"{number(r['ms_low'])}-{number(r['ms_high'])}" if "ms" in r else ""),
        ("GB/s", lambda r: number(r.get("gb_per_s"))),
        ("% of stream", lambda r: number(r.get("percent_of_stream"))),
    ]
    for ours in ("fastloss", "fastloss in place"):
        if any(f"{ours} is faster by" in row for row in rows):
            key = f"{ours} is faster by"
            columns.append((f"/ {ours}", lambda r, key=key: f"{number(r[key])}x" if key in r else ""))  # type: ignore[misc]
    columns += [
        ("loss error", lambda r: f"{r['loss_error']:.0e}" if "loss_error" in r else ""),
        ("gradient error", lambda r: f"{r['gradient_error']:.0e}" if r.get("gradient_error") is not None else ""),
    ]
    print_rows(title, rows, columns)
    for row in rows:
        if row.get("wrong"):
            console.print(f"{row['peer']}: {row['wrong']}", style="bold red", markup=False)
