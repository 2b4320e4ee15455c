# SPDX-License-Identifier: Apache-2.0
"""Small inputs and rows of few classes, where the cost of a call or of a row decides."""

from __future__ import annotations

from typing import Any

from .. import check
from ..cases import Case
from ..jobs import Job
from ..report import Goal, Section, number, print_rows
from ..settings import Settings
from ..timing import interleave_repeated

SIZES = ((8, 10), (32, 100), (1024, 100), (4096, 100), (64, 1000), (128, 1000), (256, 2000), (128, 8000), (256, 16000))
FEW_CLASSES = ((4096, 32), (4, 5, 256, 256), (4, 21, 256, 256))  # without a goal
NEVER_SLOWER_FROM = (128, 1000)  # rows and classes
OPERATIONS = {"loss": "forward", "gradient": "forward + backward"}


def measure(settings: Settings) -> Section:
    """Microseconds a call, forward only and forward with backward, against eager."""
    section = Section("small", "small inputs")
    names = [name for name in ("fastloss", "torch eager") if name in settings.peers]
    for shape in SIZES + FEW_CLASSES:
        case = Case(shape, "float32")
        for operation, label in OPERATIONS.items():
            jobs: dict[str, Job] = {}
            for name in names:
                job = settings.peers[name].jobs[operation](case)
                if check.measure(job, case).within(settings.peers[name].bounds["float32"]):
                    jobs[name] = job
            timings = interleave_repeated(jobs, 5 if settings.quick else 21)
            row: dict[str, Any] = {"shape": list(shape), "operation": label}
            row |= {f"{name} us": timing.median * 1e6 for name, timing in timings.items()}
            both = "fastloss" in timings and "torch eager" in timings
            row["ratio"] = timings["fastloss"].median / timings["torch eager"].median if both else None
            section.rows.append(row)
            _add_goal(section, shape, label, row["ratio"])
    print_rows(
        "small inputs, float32",
        section.rows,
        [
            ("shape", lambda r: " x ".join(map(str, r["shape"]))),
            ("", lambda r: r["operation"]),
            ("fastloss us", lambda r: number(r.get("fastloss us"))),
            ("eager us", lambda r: number(r.get("torch eager us"))),
            ("fastloss / eager", lambda r: number(r["ratio"])),
        ],
    )
    return section


def _add_goal(section: Section, shape: tuple[int, ...], label: str, ratio: float | None) -> None:
    what = f"fastloss / eager, {label}, {shape[0]} x {shape[1]}"
    if shape == SIZES[0]:
        section.goals.append(Goal(what, ratio, 1.5, False))
    elif shape[0] >= NEVER_SLOWER_FROM[0] and shape[1] >= NEVER_SLOWER_FROM[1]:
        section.goals.append(Goal(what, ratio, 1.0, False))
