# SPDX-License-Identifier: Apache-2.0
"""Times of work on a GPU: CUDA events, all jobs in turn."""

from __future__ import annotations

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
    """Seconds, medians over rounds."""
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 2):
        for name, timed in jobs.items():
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
