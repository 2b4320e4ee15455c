# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer whose embedding is also its vocabulary head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on normalised input and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, width = x.shape
        parts = self.query_key_value(self.attention_norm(x)).view(batch, context, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    """Maps token ids (batch, context) to hidden states (batch * context, width). `head` turns those into logits."""

    def __init__(self, classes: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads=max(1, width // 32)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    @property
    def head(self) -> torch.Tensor:
        """Weight of the vocabulary head, (classes, width): the embedding's own."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).flatten(0, 1)
