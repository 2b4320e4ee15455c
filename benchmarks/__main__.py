# SPDX-License-Identifier: Apache-2.0
"""The benchmark: `python -m benchmarks`.

Checks every answer against float64 first, times the peers in turns, prints tables with what was to be reached and
what was, and writes `benchmarks/results/cpu-<model>.json` with its plots. A run with `--quick`, `--only` or `--vocab`
is partial: it writes to `benchmarks/results/scratch/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from . import machine, peers, plots
from .report import Section, console, print_goals
from .sections import SECTIONS
from .settings import Settings

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Runs the sections asked for; returns 1 if an answer was wrong. A missed target is a result, not an error."""
    args = _arguments()
    found, missing = peers.load()
    settings = Settings(found, vocabularies=tuple(args.vocab or Settings.vocabularies), rounds=args.rounds, quick=args.quick)
    if args.quick:
        settings = Settings(found, tuple(args.vocab or [128256]), elements=128 * 128256, rounds=3, quick=True)
    description = machine.describe()
    console.print(description)
    for name, reason in missing.items():
        console.print(f"[yellow]peer {name} is not here: {reason}[/]")
    start = time.perf_counter()
    sections: dict[str, Section] = {}
    for name in _chosen(args.only):
        console.rule(name)
        sections[name] = SECTIONS[name](settings)
        for note in sections[name].notes:
            console.print(f"[dim]{note}[/]")
        print_goals(f"{name}: to reach", sections[name].goals)
    seconds = time.perf_counter() - start
    partial = bool(args.quick or args.only or args.vocab or missing.keys() & {"fastloss_torch"})
    path = _write(description | {"seconds": round(seconds)}, sections, RESULTS / "scratch" if partial else RESULTS)
    _print_summary(sections, seconds, path)
    return int(any(row.get("wrong") for section in sections.values() for row in section.rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="an eighth of the size, 3 rounds: does everything work?")
    sections = f"{', '.join(SECTIONS)}; those that go on with `-` come along"
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=sections)
    parser.add_argument("--vocab", nargs="+", type=int, help="numbers of classes of the large cases")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="rounds of the large cases (default: %(default)s)")
    return parser.parse_args()


def _chosen(only: list[str] | None) -> list[str]:
    """All sections, or those asked for: `linear` brings `linear-memory` along."""
    return [name for name in SECTIONS if only is None or any(f"{name}-".startswith(f"{wanted}-") for wanted in only)]


def _write(description: dict[str, object], sections: dict[str, Section], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.slug()}.json"
    result = {"machine": description, "sections": {name: section.as_dict() for name, section in sections.items()}}
    path.write_text(json.dumps(result, indent=1) + "\n")
    for plot in plots.draw(path):
        console.print(f"wrote {plot}")
    return path


def _print_summary(sections: dict[str, Section], seconds: float, path: Path) -> None:
    goals = [replace(goal, what=f"{name}: {goal.what}") for name, section in sections.items() for goal in section.goals]
    missed = [goal for goal in goals if goal.met is False]
    met = sum(goal.met is True for goal in goals)
    console.rule("summary")
    if missed:
        print_goals("missed", missed)
    console.print(f"{met} of {len(goals)} targets met, {len(missed)} missed, {len(goals) - met - len(missed)} not measured")
    console.print(f"{seconds:.0f} s, wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
