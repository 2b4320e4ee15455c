# SPDX-License-Identifier: Apache-2.0
"""Results as data and as tables: a section yields rows and goals, and both are printed and written to JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(width=None if sys.stdout.isatty() else 120)  # tables keep their columns in a log file


@dataclass(frozen=True)
class Goal:
    """One figure to reach. `at_least` says which side of `target` is good; `value` None means not measured."""

    what: str
    value: float | None
    target: float
    at_least: bool
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass
class Section:
    """What a section measured. `rows` hold plain values, one dictionary for each peer and case."""

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "rows": self.rows, "goals": [g.as_dict() for g in self.goals], "notes": self.notes}


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Prints one table; rows with the key `wrong` set stand out."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, (header, _) in enumerate(columns):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns), style="bold red" if row.get("wrong") else None)
    console.print(table)


def print_goals(title: str, goals: Sequence[Goal]) -> None:
    """Prints `to reach` beside what was reached."""
    if not goals:
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for header, justify in (("what", "left"), ("to reach", "right"), ("reached", "right"), ("", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for goal in goals:
        status = {True: Text("met", "green"), False: Text("missed", "bold red"), None: Text("not measured", "yellow")}[goal.met]
        reached = "-" if goal.value is None else f"{goal.value:.3g} {goal.unit}"
        table.add_row(goal.what, f"{'>=' if goal.at_least else '<='} {goal.target:.3g} {goal.unit}", reached, status)
    console.print(table)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, or a dash."""
    if value is None:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def count(value: int) -> str:
    """A size as people say it: 128256, 1M."""
    return f"{value // 10**6}M" if value >= 10**6 and value % 10**6 == 0 else str(value)
