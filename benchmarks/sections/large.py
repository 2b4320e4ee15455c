# SPDX-License-Identifier: Apache-2.0
"""Large vocabularies: the loss alone; loss and gradient, into fresh memory and in place."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..cases import Case
from ..compare import Row, compare_all, print_comparison, ratio, value
from ..report import Goal, Section
from ..settings import Settings

DTYPES = ("float32", "bfloat16")
SLOW_PEERS_AT = 128256  # single-threaded peers are shown at one vocabulary, to keep the run short


class Target(NamedTuple):
    """`numerator` over `denominator` in time shall be at least (or at most) this, by dtype."""

    what: str
    numerator: str
    denominator: str
    float32: float
    bfloat16: float
    at_least: bool = True


LOSS_TARGETS = (
    Target("eager / fastloss", "torch eager", "fastloss", 9.0, 9.0),
    Target("torch.compile / fastloss", "torch.compile", "fastloss", 1.8, 2.3),
)
STREAM_PERCENT = 80.0  # float32
GRADIENT_TARGETS = (
    Target("fresh: eager / fastloss", "torch eager", "fastloss", 10.0, 9.0),
    Target("fresh: torch.compile / fastloss", "torch.compile", "fastloss", 5.0, 5.0),
    Target("fresh: fastloss / logits.clone()", "fastloss", "logits.clone()", 0.4, 0.4, at_least=False),
    Target("in place: eager / fastloss", "torch eager", "fastloss in place", 13.0, 13.0),
    Target("in place: torch.compile / fastloss", "torch.compile", "fastloss in place", 6.0, 6.0),
)


def loss(settings: Settings) -> Section:
    """The forward pass without autograd: one read of the logits is the floor."""
    section = Section("loss", "loss alone")
    section.rows = _measure(settings, ["loss"], section.title)
    section.goals = _goals(settings, section.rows, LOSS_TARGETS)
    for classes in settings.vocabularies:
        percent = value(section.rows, "fastloss", "percent_of_stream", dtype="float32", classes=classes)
        what = f"share of the stream-read bandwidth, float32, V = {classes}"
        section.goals.append(Goal(what, percent, STREAM_PERCENT, True, "%"))
    return section


def gradient(settings: Settings) -> Section:
    """Loss and gradient. PyTorch's peers write into fresh memory, since that is all they offer."""
    section = Section("gradient", "loss and gradient")
    section.notes = [
        "GB/s counts the floor: a read and write, in the trip of the loss; a read more where inplace='backward' asks for it.",
        "The memory of the result is allocated inside the timer and freed outside it.",
        "In place: the logits are a non-leaf, refilled untimed; their gradient is consumed at no cost.",
    ]
    section.rows = _measure(settings, ["gradient", "gradient in place"], section.title)
    section.goals = _goals(settings, section.rows, GRADIENT_TARGETS)
    return section


def _goals(settings: Settings, rows: list[Row], targets: tuple[Target, ...]) -> list[Goal]:
    goals = []
    for where in _cases(settings):
        for target in targets:
            what = f"{target.what}, {where['dtype']}, V = {where['classes']}"
            reached = ratio(rows, target.numerator, target.denominator, **where)
            goals.append(Goal(what, reached, getattr(target, where["dtype"]), target.at_least))
    return goals


def _cases(settings: Settings) -> list[dict[str, Any]]:
    return [{"dtype": dtype, "classes": classes} for dtype in DTYPES for classes in settings.vocabularies]


def _measure(settings: Settings, operations: list[str], title: str) -> list[Row]:
    rows: list[Row] = []
    for where in _cases(settings):
        classes = where["classes"]
        case = Case((settings.rows(classes), classes), where["dtype"])
        peers = settings.peers
        if classes != SLOW_PEERS_AT and len(settings.vocabularies) > 1:
            peers = {name: peer for name, peer in peers.items() if not peer.slow}
        found = compare_all(case, peers, operations, settings.rounds)
        print_comparison(f"{title}: {case.rows} x {classes} {case.dtype}, {case.nbytes / 1e9:.2f} GB of logits", found)
        rows += found
    return rows
