# SPDX-License-Identifier: Apache-2.0
"""Times of work on a GPU: CUDA events, all jobs in rounds; and of the kernels that one job starts."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

ROUNDS = 15
BUSY_CYCLES = 1_000_000  # of the GPU before each job, so that it never waits for Python


class Job(NamedTuple):
    """`prepare` stands outside the timer."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


Jobs = dict[tuple[str, str], Job]  # by operation and peer


def interleave(jobs: Jobs, rounds: int = ROUNDS) -> dict[tuple[str, str], float]:
    """Seconds, medians over rounds. Each has an order of its own: who comes behind hard work finds a GPU of a lower clock."""
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in jobs}
    shuffled, order = list(jobs.items()), random.Random(0)
    for turn in range(rounds + 2):
        order.shuffle(shuffled)
        for name, timed in shuffled:
            timed.prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            begin.record()
            timed.run()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first rounds warm up
                samples[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


class Kernel(NamedTuple):
    """What a job spent in one kernel, or in copies and fills of memory."""

    name: str
    calls: int
    ms: float


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """Those that one run starts, the longest first; none where PyTorch's profiler does not see the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    found: dict[str, Kernel] = {}
    for event in trace.key_averages():
        if event.self_device_time_total > 0:
            name = short_name(event.key)
            before = found.get(name, Kernel(name, 0, 0.0))
            found[name] = Kernel(name, before.calls + event.count, before.ms + event.self_device_time_total / 1e3)
    return sorted(found.values(), key=lambda kernel: -kernel.ms)


def short_name(kernel: str) -> str:
    """Of a kernel as the profiler names it, without namespaces, types and arguments."""
    while kernel != (kernel := re.sub(r"<[^<>]*>|\([^()]*\)", "", kernel)):
        pass
    return kernel.strip().rsplit("::", 1)[-1].removeprefix("void ")
