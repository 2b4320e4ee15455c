# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy where most tokens are ignored, as the prompts of a fine-tuning batch are."""

from __future__ import annotations

from typing import Any

from ..linear import check
from ..linear.case import IGNORED, LinearCase
from ..peers.linear import EXACT, OPERATION, SAMPLED
from ..report import Goal, Section, number, print_rows
from ..settings import Settings
from ..timing import interleave
from .linear import TARGETS

SHARE = 0.8
MOST = 0.25  # of the time of all tokens, at most: about a fifth
ROUNDS = 7
Row = dict[str, Any]


def measure(settings: Settings) -> Section:
    """Each head with all tokens and with a fifth of them, in the same rounds."""
    section = Section("linear-ignored", f"linear cross-entropy, {SHARE:.0%} of the tokens ignored: loss and both gradients")
    shrink = 4 if settings.quick else 1
    for target in TARGETS:
        shape = target.tokens // shrink, target.classes // shrink, target.features
        for name in (EXACT, SAMPLED):
            if name in settings.peers:
                section.rows.append(_measure(settings, name, shape, target.dtype))
    print_rows(
        section.title,
        section.rows,
        [
            ("N x V x H", lambda r: " x ".join(map(str, r["shape"]))),
            ("dtype", lambda r: r["dtype"]),
            ("peer", lambda r: r["peer"]),
            ("tokens that count", lambda r: f"{r['counted']:.1%}"),
            ("all, ms", lambda r: number(r.get("all_ms"))),
            ("ignored, ms", lambda r: "wrong" if "wrong" in r else number(r["ms"])),
            ("ignored / all", lambda r: number(r.get("ratio"))),
        ],
    )
    for row in section.rows:
        where = f"{' x '.join(map(str, row['shape']))} {row['dtype']}"
        section.goals.append(Goal(f"{row['peer']}, ignored / all, {where}", row.get("ratio"), MOST, False))
    return section


def _measure(settings: Settings, name: str, shape: tuple[int, int, int], dtype: str) -> Row:
    peer = settings.peers[name]
    cases = {"all": LinearCase(*shape, dtype), "ignored": LinearCase(*shape, dtype, ignored=SHARE)}
    jobs = {key: peer.jobs[OPERATION](case) for key, case in cases.items()}
    counted = (cases["ignored"].target != IGNORED).double().mean().item()
    row: Row = {"peer": name, "dtype": dtype, "shape": list(shape), "counted": counted}
    for key, job in jobs.items():
        job.run()
        errors = check.measure(job, cases[key], peer.sampled)
        job.release()
        if not errors.within(peer.bounds[dtype]):
            return row | {"wrong": f"{key}: {errors}"}
    timings = interleave(jobs, min(ROUNDS, settings.rounds))
    whole, part = (timings[key].median for key in cases)
    return row | {"all_ms": whole * 1e3, "ms": part * 1e3, "ratio": part / whole}
