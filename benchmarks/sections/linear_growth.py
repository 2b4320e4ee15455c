# SPDX-License-Identifier: Apache-2.0
"""Growth of the time of linear cross-entropy with tokens, classes and features."""

from __future__ import annotations

from typing import Any

from ..fit import TOLERANCE, fit_line, last_step, points
from ..jobs import Job
from ..linear import check
from ..linear.case import LinearCase
from ..peers.linear import EXACT, OPERATION, SAMPLED
from ..report import Goal, Section, number, print_rows
from ..settings import Settings
from ..timing import interleave

BASE = (512, 32000, 512)
SIZES = {
    "N": (256, 512, 1024, 2048, 4096),
    "V": (8000, 16000, 32000, 64000, 128000),
    "H": (256, 512, 1024, 2048, 4096),
}
ROUNDS = 7


def measure(settings: Settings) -> Section:
    """Median times along the three axes, and how far they are from a line."""
    section = Section("linear-growth", "growth of the time of linear cross-entropy, loss and gradients, float32")
    shrink = 4 if settings.quick else 1
    for index, (axis, sizes) in enumerate(SIZES.items()):
        shapes = [(*BASE[:index], size, *BASE[index + 1 :]) for size in sizes]
        section.rows += _measure(settings, axis, [LinearCase(n, v // shrink, h, "float32") for n, v, h in shapes])
    print_rows(
        section.title,
        section.rows,
        [
            ("peer", lambda r: r["peer"]),
            ("along", lambda r: r["axis"]),
            *((axis, lambda r, i=i: str(r["shape"][i])) for i, axis in enumerate("NVH")),  # type: ignore[misc]
            ("ms", lambda r: "wrong" if "wrong" in r else number(r["ms"])),
        ],
    )
    right = [row for row in section.rows if "wrong" not in row]
    for name in (EXACT, SAMPLED):
        for axis in SIZES:
            found = points(right, name, axis)
            line = fit_line(found)
            distance = None if line is None else line.distance
            section.goals.append(Goal(f"{name}: farthest time from a line in {axis}", distance, TOLERANCE, False, ""))
            section.goals.append(Goal(f"{name}: growth of the last step in {axis}", last_step(found), 1 + TOLERANCE, False))
    return section


def _measure(settings: Settings, axis: str, cases: list[LinearCase]) -> list[dict[str, Any]]:
    """All sizes in the same rounds: a drift of the machine must not look like growth."""
    rows: list[dict[str, Any]] = []
    jobs: dict[str, Job] = {}
    for case in cases:
        for name in (EXACT, SAMPLED):
            peer = settings.peers[name]
            job = peer.jobs[OPERATION](case)
            job.run()
            errors = check.measure(job, case, peer.sampled)
            job.release()
            rows.append({"peer": name, "axis": axis, "shape": list(case.shape)})
            if errors.within(peer.bounds[case.dtype]):
                jobs[str(len(rows) - 1)] = job
            else:
                rows[-1]["wrong"] = str(errors)
        del case.reference  # large, and checked
    for place, timing in interleave(jobs, ROUNDS).items():
        rows[int(place)]["ms"] = timing.median * 1e3
    return rows
