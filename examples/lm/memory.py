# SPDX-License-Identifier: Apache-2.0
"""Resident memory of this process, now and at its peak (Linux; elsewhere the peak of the whole run)."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def resident() -> int:
    """Bytes held now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes held since the last reset."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Lets the peak start anew from what is held now, where the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
