"""Two jobs on random data with whose cells in sight nothing in the planner was ever changed.

    paceline train benchmarks/unseen_jobs.py --set model=latents

`--set model=` chooses one:

    latents 32 vectors that four times look at 128 inputs and at each other (1.1 M parameters), 32 sets, AdamW
    dense   three blocks of four convolutions, each of which sees what all before it have made (0.1 M parameters), 32
            images 3×32×32, SGD with momentum

Once one of their cells has led to a change they belong to held_out_jobs.py, and others come here.
"""

from __future__ import annotations

import functools

import torch
from random_jobs import adamw, class_loss, labelled, make, sgd
from torch import nn

import paceline

options = paceline.options(model="latents")


class LookingLayer(nn.Module):
    """Latents [b, l, width] and inputs [b, n, width] -> latents."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.input_norm, self.norm, self.own_norm, self.last_norm = (nn.LayerNorm(width) for _ in range(4))
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        self.among = nn.MultiheadAttention(width, heads, batch_first=True)
        self.each = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.input_norm(inputs)
        x = latents + self.across(self.norm(latents), inputs, inputs, need_weights=False)[0]
        y = self.own_norm(x)
        x = x + self.among(y, y, y, need_weights=False)[0]
        return x + self.each(self.last_norm(x))


class Latents(nn.Module):
    """Inputs [b, n, features] -> scores of 10 classes."""

    def __init__(self, features: int, number: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.latents = nn.Parameter(0.02 * torch.randn(1, number, width))
        self.layers = nn.ModuleList(LookingLayer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.head(latents.mean(1))


class DenseBlock(nn.Module):
    """Images [b, inputs, h, w] -> [b, inputs + layers × growth, h, w]: each layer sees what all before it have made."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, inputs + growth * number),
                nn.ReLU(),
                nn.Conv2d(inputs + growth * number, growth, 3, padding=1, bias=False),
            )
            for number in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Dense(nn.Module):
    """Images [b, 3, n, n] -> scores of 10 classes."""

    def __init__(self, width: int, growth: int, layers: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(DenseBlock(width, growth, layers))
            grown = width + growth * layers
            width = grown // 2
            self.between.append(nn.Sequential(nn.Conv2d(grown, width, 1), nn.AvgPool2d(2)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x))
        return self.head(x.mean((2, 3)))


JOBS = {
    "latents": lambda: make(
        functools.partial(Latents, 32, 32, 128, 4, 4),
        functools.partial(labelled, (128, 32), 10),
        class_loss,
        adamw,
        32,
    ),
    "dense": lambda: make(
        functools.partial(Dense, 32, 16, 4, 3),
        functools.partial(labelled, (3, 32, 32), 10),
        class_loss,
        sgd,
        32,
    ),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
