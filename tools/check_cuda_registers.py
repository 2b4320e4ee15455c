# SPDX-License-Identifier: Apache-2.0
"""Compile every CUDA kernel for every architecture, print what ptxas says of its registers, and fail where one spills.

Usage: check_cuda_registers.py [ARCHITECTURE ...]   (by default 80 89 90 100 120; needs nvcc, no GPU)
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.parent.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("80", "89", "90", "100", "120")
# As cmake/cuda.cmake has them.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-diag-suppress=1675", "-Xptxas=-v")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?\n"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers.*?(?:(?P<shared>\d+) bytes smem)?(?:,|\n)",
    re.DOTALL,
)
TYPES = {"If": "f32", "Id": "f64", "IN": "16-bit", "v": ""}


def reports(source: Path, architecture: str) -> list[dict[str, str]]:
    """One dictionary a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", f"-arch=sm_{architecture}", *FLAGS, "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return [match.groupdict() for match in REPORT.finditer(done.stderr)]


def short(name: str) -> str:
    """`scan_kernel<1,0,0>`: the constants of a mangled name, without its types."""
    found = re.search(r"\d+([a-z_]+_kernel)", name)
    constants = re.findall(r"Lb([01])E", name)
    return (found[1] if found else name) + (f"<{','.join(constants)}>" if constants else "")


def main(architectures: list[str]) -> int:
    """Prints a line a kernel; returns 1 if any of them spills."""
    if shutil.which("nvcc") is None:
        sys.exit("check_cuda_registers.py needs nvcc on the path")
    spills = kernels = 0
    for source in SOURCES:
        found = {architecture: reports(source, architecture) for architecture in architectures}
        print(f"{source.name}: registers for {', '.join(architectures)}")
        for per_architecture in zip(*found.values(), strict=True):
            by_name = {
                architecture: next(r for r in found[architecture] if r["name"] == per_architecture[0]["name"])
                for architecture in architectures
            }
            registers = " ".join(f"{report['registers']:>4}" for report in by_name.values())
            spilled = {a: r["stores"] for a, r in by_name.items() if r["stores"] != "0" or r["loads"] != "0"}
            kernels += len(by_name)
            spills += len(spilled)
            print(f"  {short(per_architecture[0]['name']):<28} {registers}" + (f"  SPILLS {spilled}" if spilled else ""))
    print(f"{kernels} kernels, {spills} of them spill")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)))
