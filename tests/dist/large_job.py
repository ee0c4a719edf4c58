"""A job whose state is large and whose work is small: 16 blocks of 4.2 M parameters, 1 GiB with Adam's moments."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

WIDTH, BLOCKS = 1024, 16
BATCH = 2
"""With so few samples only a few layouts are tried, each of which takes seconds with so many parameters."""


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def data(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(int(split == "test"))
    inputs = torch.randn(8 * BATCH, WIDTH, generator=generator)
    return TensorDataset(inputs, inputs[:, :10].argmax(1))


job = paceline.Job(
    model=Stack,
    data=data,
    loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-4),
    batch_size=BATCH,
    steps=4,
)
