# SPDX-License-Identifier: Apache-2.0
"""What a figure depends on: processor, threads, memory, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastloss", "torch", "numpy", "scipy", "jax", "optax", "ml_dtypes")


def describe() -> dict[str, Any]:
    """Returns everything that a result file says about where it was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu_model(),
        "isa": _isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "memory_gb": round(_meminfo("MemTotal") / 1e9, 1),
        "huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return _meminfo("MemAvailable")


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def slug() -> str:
    """The processor's name as part of a file name."""
    return "cpu-" + re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")


def _isa() -> str | None:
    try:
        import fastloss
    except ImportError:
        return None
    return str(fastloss.isa())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The short commit, with a plus sign where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Results are written after the measurement, so they do not count as a difference.
        status = [*run, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def _meminfo(field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) * 1024 if match else 0


def _caches() -> dict[str, str]:
    """Sizes of the caches that the first core sees."""
    caches = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (cache / "type").read_text().strip()
        if kind != "Instruction":
            caches["L" + (cache / "level").read_text().strip()] = (cache / "size").read_text().strip()
    return caches


def _huge_pages() -> str:
    try:
        return re.findall(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())[0]
    except (OSError, IndexError):
        return "unknown"
