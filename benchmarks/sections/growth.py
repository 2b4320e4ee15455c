# SPDX-License-Identifier: Apache-2.0
"""Growth of the time of loss and gradient with the number of rows, and of classes up to a million."""

from __future__ import annotations

import math
from typing import Any

from ..cases import Case
from ..fit import OUT_OF_CACHE, TOLERANCE, fit_line, last_step, overall, points
from ..machine import available_memory
from ..report import Goal, Section, count, number, print_rows
from ..settings import Settings
from ..timing import Repeated, interleave

CLASSES = (1000, 4000, 16000, 64000, 128000, 256000, 512000, 1000000)
# All beyond the cache: whether a few rows that lie in it take less time says something of the machine, not of growth.
ROWS = (1024, 2048, 4096, 8192, 16384)
FIXED_ROWS, FIXED_CLASSES = 256, 32000
LIMIT = {"torch eager": 2**27}  # elements; slower peers stop here, to keep the run and its rounds short
ROUNDS = 15


def measure(settings: Settings) -> Section:
    """Median times along both axes, and how far they are from a line where caches no longer matter."""
    section = Section("growth", "growth of the time of loss and gradient, float32")
    shrink = 8 if settings.quick else 1
    along_classes = [(FIXED_ROWS // shrink, classes) for classes in CLASSES]
    along_rows = [(rows // shrink, FIXED_CLASSES) for rows in ROWS]
    for axis, shapes in (("V", along_classes), ("N", along_rows)):
        small = [shape for shape in shapes if 4 * math.prod(shape) < OUT_OF_CACHE / shrink]
        for together in (*([shape] for shape in small), shapes[len(small) :]):
            section.rows += _measure(settings, axis, together)
    print_rows(
        section.title,
        section.rows,
        [
            ("peer", lambda r: r["peer"]),
            ("along", lambda r: r["axis"]),
            ("N", lambda r: str(r["shape"][0])),
            ("V", lambda r: count(r["shape"][1])),
            ("ms", lambda r: number(r["ms"])),
            ("ns per logit", lambda r: number(1e6 * r["ms"] / (r["shape"][0] * r["shape"][1]))),
        ],
    )
    for name in ("fastloss", "fastloss in place"):
        for axis in ("V", "N"):
            found = points(section.rows, name, axis)
            line = fit_line(points(section.rows, name, axis, OUT_OF_CACHE / shrink))
            distance = None if line is None else line.distance
            what = f"{name}: farthest time from a line in {axis}, beyond the cache"
            section.goals.append(Goal(what, distance, TOLERANCE, False, ""))
            for what, step in (("first to last size", overall(found)), ("the last step", last_step(found))):
                section.goals.append(Goal(f"{name}: growth from {what} in {axis}", step, 1 + TOLERANCE, False))
    return section


def _measure(settings: Settings, axis: str, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """All these sizes in the same rounds: a drift of the machine must not look like growth."""
    rows: list[dict[str, Any]] = []
    jobs: dict[str, Repeated] = {}
    for shape in shapes:
        case = Case(shape, "float32")
        if 5 * case.nbytes > available_memory():
            continue
        for name, operation in (
            ("fastloss", "gradient"),
            ("fastloss in place", "gradient in place"),
            ("torch eager", "gradient"),
        ):
            if name in settings.peers and case.rows * case.classes <= LIMIT.get(name, 2**62):
                job = settings.peers[name].jobs[operation](case)
                job.prepare()
                job.run()
                job.release()
                jobs[str(len(rows))] = Repeated(job)
                rows.append({"peer": name, "axis": axis, "shape": list(shape)})
    slow = frozenset(place for place in jobs if rows[int(place)]["peer"] in LIMIT)
    for place, timing in interleave(jobs, 3 if settings.quick else ROUNDS, slow).items():
        rows[int(place)]["ms"] = timing.median * 1e3 / jobs[place].calls
    return rows
