# SPDX-License-Identifier: Apache-2.0
"""The limit of the memory: read, and read + write in place, by all threads, on as many bytes and in the same rounds."""

from __future__ import annotations

import torch

from ..cases import Case
from ..jobs import Job
from . import Peer

try:
    from fastloss._cpu import stream_read, stream_update
except ImportError:  # PyTorch comes close where its integer sum is vectorised
    stream_read = stream_update = None

READ, UPDATE = "stream read", "stream update"


class StreamRead(Job):
    """Reads every byte of the logits and does next to nothing with it."""

    floor_reads = 1

    def __init__(self, case: Case) -> None:
        self.buffer = case.logits

    def run(self) -> None:
        if stream_read is None:
            self.buffer.flatten().view(torch.int32).sum()
        else:
            stream_read(self.buffer.data_ptr(), self.buffer.nbytes)


class StreamUpdate(Job):
    """Reads and rewrites every byte of a buffer of the same size, whose pages are there already."""

    floor_updates = 1

    def __init__(self, case: Case) -> None:
        self.buffer = case.working

    def run(self) -> None:
        if stream_update is None:
            self.buffer.flatten().view(torch.int32).add_(1)
        else:
            stream_update(self.buffer.data_ptr(), self.buffer.nbytes)


def peers() -> list[Peer]:
    jobs = {"loss": StreamRead, "gradient": StreamRead}
    return [Peer(READ, jobs, order=70), Peer(UPDATE, {"gradient": StreamUpdate}, order=71)]
