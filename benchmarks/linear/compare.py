# SPDX-License-Identifier: Apache-2.0
"""The comparison: peers checked and timed in turns, with the bare products between them as marks."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import check as errors_of
from ..jobs import Job
from ..peers import Peer
from ..peers.linear import EXACT, OPERATION, SAMPLED
from ..report import console, number, print_rows
from ..timing import Timing, interleave
from . import check
from .case import LinearCase
from .jobs import ROLES, products

Row = dict[str, Any]
ALL_PRODUCTS, FORWARD_PRODUCT = "the three best products", "the best forward product"
MARKS = (ALL_PRODUCTS, FORWARD_PRODUCT)
CONTENDER = 1.25  # of the best time of a product in two runs: who is slower than this will not win the median


def compare_all(case: LinearCase, peers: Mapping[str, Peer], rounds: int) -> list[Row]:
    """Returns one row for each peer, and one for each mark; whoever answers wrongly is not timed."""
    jobs: dict[str, Job] = {}
    found: dict[str, errors_of.Errors] = {}
    timings: dict[str, Timing] = {}
    wrong: list[Row] = []
    for name, peer in peers.items():
        job = peer.jobs[OPERATION](case)
        job.run()
        job.release()  # memory and threads are there now
        try:
            seconds = _seconds(job)
            found[name] = check.measure(job, case, peer.sampled)
        except (RuntimeError, TypeError, ValueError) as error:
            wrong.append(_row(case, name) | {"wrong": f"{type(error).__name__}: {error}"})
            continue
        finally:
            job.release()
        if not found[name].within(peer.bounds[case.dtype]):
            wrong.append(_row(case, name) | {"wrong": f"{found[name]}, where {peer.bounds[case.dtype]} is allowed"})
        elif peer.once:
            timings[name] = Timing.of([seconds])
        else:
            jobs[name] = job
    contenders = _contenders(case)
    slow = frozenset(name for name in jobs if peers[name].slow)
    timings |= interleave(jobs | {str(key): job for key, job in contenders.items()}, rounds, slow)
    best = {role: min((timings[str(key)].median, key) for key in contenders if key[0] == role) for role in ROLES}
    rows = [_row(case, name, timings[name], found[name]) for name in peers if name in timings]
    for row in rows:
        row["flops"] = (1 if peers[row["peer"]].sampled else 3) * case.product_flops
    return rows + wrong + _mark_rows(case, best)


def _seconds(job: Job) -> float:
    gc.collect()
    start = time.perf_counter()
    job.run()
    return time.perf_counter() - start


def _contenders(case: LinearCase) -> dict[tuple[str, str, int], Job]:
    """The ways to make each product, less those that are clearly slower than the best."""
    ways = products(case)
    seconds = {key: min(_seconds(job), _seconds(job)) for key, job in ways.items()}
    best = {role: min(s for key, s in seconds.items() if key[0] == role) for role in ROLES}
    return {key: job for key, job in ways.items() if seconds[key] <= CONTENDER * best[key[0]]}


def _mark_rows(case: LinearCase, best: Mapping[str, tuple[float, tuple[str, str, int]]]) -> list[Row]:
    rows = []
    for mark, roles in ((ALL_PRODUCTS, ROLES), (FORWARD_PRODUCT, ROLES[:1])):
        row = _row(case, mark) | {"ms": 1e3 * sum(best[role][0] for role in roles), "flops": len(roles) * case.product_flops}
        rows.append(row | {"made by": {role: f"{best[role][1][1]}, {best[role][1][2]} tokens" for role in roles}})
    return rows


def _row(case: LinearCase, peer: str, timing: Timing | None = None, errors: errors_of.Errors | None = None) -> Row:
    row: Row = {"peer": peer, "dtype": case.dtype, "shape": list(case.shape)}
    if errors is not None:
        row |= {"loss_error": errors.loss, "gradient_error": errors.gradient}
    if timing is not None:
        row |= {"ms": timing.median * 1e3, "ms_low": timing.low * 1e3, "ms_high": timing.high * 1e3, "samples": timing.samples}
    return row


def print_comparison(title: str, rows: Sequence[Row]) -> None:
    """Prints one table of `compare_all`."""
    times = {row["peer"]: row["ms"] for row in rows if "ms" in row}

    def ratio(row: Row, ours: str) -> str:
        return f"{number(row['ms'] / times[ours])}x" if "ms" in row and ours in times else ""

    print_rows(
        title,
        rows,
        [
            ("peer", lambda r: r["peer"]),
            ("ms", lambda r: "wrong" if "wrong" in r else number(r["ms"])),
            ("quartiles", lambda r: f"{number(r['ms_low'])}-{number(r['ms_high'])}" if "ms_low" in r else ""),
            ("GFLOP/s", lambda r: number(r["flops"] / r["ms"] / 1e6) if "flops" in r else ""),
            ("/ exact", lambda r: ratio(r, EXACT)),
            ("/ sampled", lambda r: ratio(r, SAMPLED)),
            ("loss error", lambda r: f"{r['loss_error']:.0e}" if "loss_error" in r else ""),
            ("gradient error", lambda r: f"{r['gradient_error']:.0e}" if "gradient_error" in r else ""),
        ],
    )
    for row in rows:
        if "wrong" in row:
            console.print(f"{row['peer']}: {row['wrong']}", style="bold red", markup=False)
        if "made by" in row and row["peer"] == ALL_PRODUCTS:
            made = "; ".join(f"{role}: {by}" for role, by in row["made by"].items())
            console.print(f"{row['peer']}: {made}", style="dim", markup=False)
