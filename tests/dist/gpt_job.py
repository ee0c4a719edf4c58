"""A small GPT: positions are read between its pieces, and its head has the table of the embedding."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

LENGTH, SAMPLES = 16, 64


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.three, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.three(self.before(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.wide(self.after(x))


class Gpt(nn.Module):
    def __init__(self, width: int, blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(width: int, blocks: int = 3, vocabulary: int = 512, batch_size: int = 8) -> paceline.Job:
    def tokens(split: str) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(vocabulary, (SAMPLES, LENGTH + 1), generator=generator)
        return TensorDataset(text[:, :-1], text[:, 1:])

    return paceline.Job(
        model=functools.partial(Gpt, width, blocks, vocabulary),
        data=tokens,
        loss=lambda outputs, batch: F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten()),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
        batch_size=batch_size,
        clip_norm=1.0,
        name="gpt",
    )
