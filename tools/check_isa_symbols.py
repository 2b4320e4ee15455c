# SPDX-License-Identifier: Apache-2.0
"""Check that no function of an ISA object can replace one of another: nm must show no weak and no unique symbols.

An inline or template function with external linkage that is compiled in two files with different -m flags is merged by
the linker, which may keep the AVX-512 copy: an illegal instruction on every older CPU.
"""

import subprocess
import sys
from pathlib import Path

MERGEABLE = {"W": "weak", "V": "weak object", "u": "unique"}


def main(build_dir: str) -> int:
    """Print the offending symbols of all ISA objects under `build_dir`; 0 when there are none."""
    objects = sorted(Path(build_dir).glob("CMakeFiles/isa_*.dir/csrc/isa/*.o"))
    if not objects:
        print(f"no ISA objects under {build_dir}: nothing was checked")
        return 1
    offences = 0
    for path in objects:
        for line in subprocess.check_output(["nm", "-C", "--defined-only", path], text=True).splitlines():
            kind, symbol = line[17:].split(" ", 1)
            if kind in MERGEABLE:
                print(f"{path.name}: {MERGEABLE[kind]}: {symbol}")
                offences += 1
    print(f"{len(objects)} ISA objects: {offences} symbols that the linker could merge")
    return offences > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
