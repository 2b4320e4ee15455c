# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one operation of one peer: `python -m benchmarks.memory_probe PEER OPERATION DTYPE SHAPE...`.

The operation runs once to load, compile and start whatever it needs. Then the kernel's high-water mark of the resident
size is set back, the operation runs again, and the mark less the size before is printed as JSON.
"""

from __future__ import annotations

import gc
import json
import re
import resource
import sys
from pathlib import Path

import fastloss

from .cases import Case
from .jobs import Unsupported
from .peers import load

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Sets the high-water mark back to the present size; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The high-water mark since the last reset."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) * 1024 if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    peer, operation, dtype, *shape = sys.argv[1:]
    case = Case(tuple(map(int, shape)), dtype)
    try:
        job = load()[0][peer].jobs[operation](case)
    except Unsupported:
        print("{}")
        return
    job.prepare()
    job.run()
    job.release()
    job.prepare()
    gc.collect()
    fastloss.release_memory()  # what fastloss keeps for the next gradient counts as well
    before = resident()
    exact = reset_peak()
    job.run()
    print(json.dumps({"logits_mb": case.nbytes / 1e6, "peak_mb": (peak() - before) / 1e6, "exact": exact}))


if __name__ == "__main__":
    main()
