"""Growth of the time of loss and gradient with the number of rows, and of classes up to a million."""

from __future__ import annotations

from typing import Any

from ..cases import Case
from ..fit import OUT_OF_CACHE, exponent
from ..jobs import Job
from ..machine import available_memory
from ..report import Goal, Section, count, number, print_rows
from ..settings import Settings
from ..timing import interleave, interleave_repeated

CLASSES = (1000, 4000, 16000, 64000, 256000, 1000000)
ROWS = (16, 64, 256, 1024, 2048, 4096)
FIXED_ROWS, FIXED_CLASSES = 256, 32000
LIMIT = {"torch eager": 2**27}  # elements; slower peers stop here, to keep the run short
TOLERANCE = 0.1


def measure(settings: Settings) -> Section:
    """Median times along both axes, and the exponent of a power law through the sizes beyond the cache."""
    section = Section("growth", "growth of the time of loss and gradient, float32")
    shrink = 8 if settings.quick else 1
    along_classes = [(FIXED_ROWS // shrink, classes) for classes in CLASSES]
    along_rows = [(max(1, rows // shrink), FIXED_CLASSES) for rows in ROWS]
    for axis, shapes in (("V", along_classes), ("N", along_rows)):
        for shape in shapes:
            section.rows += _measure(settings, axis, shape)
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
            # |exponent - 1|, so that both sides of 1 can miss.
            slope = exponent(section.rows, name, axis, OUT_OF_CACHE / shrink)
            distance = None if slope is None else abs(slope - 1)
            what = f"{name}: distance of the exponent of {axis} from 1, beyond the cache"
            section.goals.append(Goal(what, distance, TOLERANCE, False, ""))
    return section


def _measure(settings: Settings, axis: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    case = Case(shape, "float32")
    if 5 * case.nbytes > available_memory():
        return []
    jobs: dict[str, Job] = {}
    for name, operation in (
        ("fastloss", "gradient"),
        ("fastloss in place", "gradient in place"),
        ("torch eager", "gradient"),
    ):
        if name in settings.peers and case.rows * case.classes <= LIMIT.get(name, 2**62):
            jobs[name] = settings.peers[name].jobs[operation](case)
    for job in jobs.values():
        job.prepare()
        job.run()
        job.release()
    if case.nbytes > 8e6:
        timings = interleave(jobs, 3 if settings.quick else 7)
    else:
        timings = interleave_repeated(jobs, 3 if settings.quick else 7)
    return [{"peer": name, "axis": axis, "shape": list(shape), "ms": timing.median * 1e3} for name, timing in timings.items()]
