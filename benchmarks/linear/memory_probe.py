# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call of linear cross-entropy: `python -m benchmarks.linear.memory_probe PEER DTYPE N V H`.

A small call loads and starts whatever is needed. Then the kernel's high-water mark of the resident size is set back, loss
and gradients are made once, and the mark less the size before is printed as JSON: gradients included, factors not.
"""

from __future__ import annotations

import gc
import json
import sys

import fastloss

from ..memory_probe import peak, reset_peak, resident
from ..peers import load
from ..peers.linear import OPERATION
from .case import LinearCase

WARM_UP = (64, 4096)


def main() -> None:
    peer, dtype, *shape = sys.argv[1:]
    tokens, classes, features = map(int, shape)
    make = load()[0][peer].jobs[OPERATION]
    make(LinearCase(*WARM_UP, features, dtype)).run()
    job = make(LinearCase(tokens, classes, features, dtype))
    gc.collect()
    fastloss.release_memory()
    before = resident()
    exact = reset_peak()
    job.run()
    found = {"peak_mb": (peak() - before) / 1e6, "exact": exact, "loss": float(job.loss.detach())}
    found["gradients_mb"] = sum(gradient.nbytes for gradient in job.gradients()) / 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main()
