# SPDX-License-Identifier: Apache-2.0
"""Install a wheel in a clean environment where no compiler can be found, and use it.

Usage: check_wheel.py WHEEL VENV_DIR
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

SMOKE_TEST = """
import sys
import numpy as np
import fastloss

assert "torch" not in sys.modules, "import fastloss must not import torch"
logits = np.zeros((3, 5), dtype=np.float32)
loss, grad = fastloss.cross_entropy(logits, np.array([0, 4, 2]), return_grad=True)
assert np.isclose(loss, np.log(5)), loss
assert np.allclose(grad.sum(axis=1), 0, atol=1e-7), grad
print("cross_entropy of flat logits:", float(loss))
"""


def check_content(wheel: str) -> None:
    """The modules, those of CUDA where nvcc is found, the types, the licence; nothing that belongs to the source tree only."""
    names = zipfile.ZipFile(wheel).namelist()
    modules = ("fastloss/_cpu.", "fastloss/_cuda.") if shutil.which("nvcc") else ("fastloss/_cpu.",)
    for part in (*modules, "fastloss/py.typed", "/licenses/LICENSE"):
        if not any(part in name for name in names):
            sys.exit(f"{wheel} has no {part}")
    strays = [name for name in names if not name.startswith("fastloss")]
    if strays:
        sys.exit(f"{wheel} also holds {strays}")


def main(wheel: str, venv_dir: str) -> None:
    """Exit with an error if any step fails."""
    check_content(wheel)
    venv.create(venv_dir, clear=True)
    bin_dir = Path(venv_dir).resolve() / "bin"
    python = str(bin_dir / "python")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    environment["PATH"] = str(bin_dir)
    for compiler in ("cc", "gcc", "g++", "clang++", "cmake"):
        if shutil.which(compiler, path=environment["PATH"]):
            sys.exit(f"{compiler} is still on the path")

    # The pip of this interpreter installs into the other one: a bare environment is enough there.
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--only-binary=:all:", wheel]
    subprocess.run(pip, env=environment, check=True)
    subprocess.run([python, "-m", "fastloss"], env=environment, cwd=venv_dir, check=True)
    subprocess.run([python, "-c", SMOKE_TEST], env=environment, cwd=venv_dir, check=True)
    print(f"{Path(wheel).name} works in a clean environment")


if __name__ == "__main__":
    main(*sys.argv[1:])
