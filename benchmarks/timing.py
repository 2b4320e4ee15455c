# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round runs every job once, so that drift of the machine meets all peers alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .jobs import Job

# Before each run: idle OpenMP threads spin for milliseconds, on the cores that a peer with threads of its own needs.
PAUSE = 5e-3


@dataclass(frozen=True)
class Timing:
    """Seconds: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def interleave(jobs: Mapping[str, Job], rounds: int, slow: frozenset[str] = frozenset()) -> dict[str, Timing]:
    """Times jobs that have run before. The order turns by one each round; slow jobs stop after three rounds."""
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def once(name: str) -> float:
        job = jobs[name]
        job.prepare()
        time.sleep(PAUSE)
        start = time.perf_counter()
        job.run()
        elapsed = time.perf_counter() - start
        job.release()
        return elapsed

    _run_rounds(names, rounds, slow, once, seconds)
    return at_one_speed(seconds)


def interleave_repeated(jobs: Mapping[str, Job], rounds: int, sample_seconds: float = 3e-3) -> dict[str, Timing]:
    """The same for jobs of microseconds: each sample is the mean of as many calls as fill `sample_seconds`.

    `release` stands inside the timer here, for every peer alike.
    """
    calls = {name: _calls_to_fill(job, sample_seconds) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}

    def once(name: str) -> float:
        return _repeat(jobs[name], calls[name]) / calls[name]

    _run_rounds(list(jobs), rounds, frozenset(), once, seconds)
    return at_one_speed(seconds)


class Repeated(Job):
    """A job as often as fills `sample_seconds`, so that short and long ones may be timed in the same rounds.

    It runs once before the timer starts: its memory is then what it left itself, and not another job of another size.
    """

    def __init__(self, job: Job, sample_seconds: float = 3e-3) -> None:
        self.job, self.calls = job, _calls_to_fill(job, sample_seconds)

    def prepare(self) -> None:
        self.job.prepare()
        self.job.run()
        self.job.release()
        self.job.prepare()

    def run(self) -> None:
        for _ in range(self.calls - 1):
            self.job.run()
            self.job.release()
        self.job.run()

    def release(self) -> None:
        self.job.release()


def _run_rounds(
    names: list[str], rounds: int, slow: frozenset[str], once: Callable[[str], float], seconds: dict[str, list[float]]
) -> None:
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                if turn < 3 or name not in slow:
                    seconds[name].append(once(name))
    finally:
        gc.enable()


def at_one_speed(seconds: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Timings as if every round had run at the speed of the median one.

    A shared machine is a third faster or slower for seconds to minutes at a time: plain medians of two jobs may be of different
    speeds. What a round adds to the logarithms of the times is the median of what it adds to those of the jobs that run in all.
    """
    rounds = max(map(len, seconds.values()), default=0)
    logs = [[math.log(time) for time in times] for times in seconds.values() if len(times) == rounds]
    if len(logs) < 2:
        return {name: Timing.of(times) for name, times in seconds.items()}
    added = [statistics.median(of_job[turn] - statistics.fmean(of_job) for of_job in logs) for turn in range(rounds)]
    factors = [math.exp(statistics.median(added) - of_round) for of_round in added]
    return {
        name: Timing.of([time * factor for time, factor in zip(times, factors, strict=False)])
        for name, times in seconds.items()
    }


def _calls_to_fill(job: Job, seconds: float) -> int:
    calls = 1
    while (elapsed := _repeat(job, calls)) < seconds:
        calls = max(2 * calls, min(int(calls * seconds / max(elapsed, 1e-9)) + 1, 10 * calls))
    return calls


def _repeat(job: Job, calls: int) -> float:
    run, release = job.run, job.release
    start = time.perf_counter()
    for _ in range(calls):
        run()
        release()
    return time.perf_counter() - start
