# SPDX-License-Identifier: Apache-2.0
"""What a training run depends on. The fields are the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Config:
    """Sizes that let five losses finish within five minutes on two cores."""

    steps: int = field(default=100, metadata={"help": "optimiser steps"})
    batch: int = field(default=4, metadata={"help": "sequences in a batch"})
    context: int = field(default=128, metadata={"help": "tokens in a sequence"})
    width: int = field(default=96, metadata={"help": "width of the model"})
    layers: int = field(default=2, metadata={"help": "transformer blocks"})
    vocab: int = field(default=0, metadata={"help": "only this many of the 151,643 ids (0: all)"})
    rate: float = field(default=3e-3, metadata={"help": "peak learning rate"})
    seed: int = field(default=0, metadata={"help": "of the weights and of the batches"})
    text_mb: float = field(default=4.0, metadata={"help": "megabytes of text"})
    dtype: str = field(default="float32", metadata={"help": "of the logits: float32 or bfloat16"})
    threshold: float = field(default=1 / 64, metadata={"help": "of the sampled backward, for the loss linear-sampled"})

    @property
    def tokens(self) -> int:
        """Tokens in a batch: rows of the logits."""
        return self.batch * self.context

    def as_arguments(self) -> list[str]:
        """The command line that makes this configuration."""
        return [part for f in fields(self) for part in (_option(f.name), str(getattr(self, f.name)))]


def parse_config(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """Adds an option for each field and parses."""
    for f in fields(Config):
        choices = ["float32", "bfloat16"] if f.name == "dtype" else None
        text = f"{f.metadata['help']} (default: %(default)s)"
        parser.add_argument(_option(f.name), type=type(f.default), default=f.default, choices=choices, help=text)
    args = parser.parse_args()
    return args, Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
