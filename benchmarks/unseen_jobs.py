"""Two jobs on random data with whose cells in sight nothing in the planner was ever changed.

    paceline train benchmarks/unseen_jobs.py --set model=latents

`--set model=` chooses one:

    latents 32 vectors that four times look at 128 inputs and at each other (1.1 M parameters), 32 sets, AdamW
    mobile  eight residual blocks of convolutions of one channel each between such of one pixel, on three scales
            (0.3 M parameters), 32 images 3×32×32, SGD with momentum

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


class InvertedBlock(nn.Module):
    """[b, inputs, h, w] -> [b, outputs, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.is_residual = inputs == outputs and stride == 1
        self.steps = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.steps(x) if self.is_residual else self.steps(x)


class Mobile(nn.Module):
    """Images [b, 3, n, n] -> scores of 10 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, stride=2, padding=1)
        sizes = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1), (4, 2), (4, 1), (4, 1))
        inputs = [1, *(size for size, _ in sizes)]
        self.blocks = nn.ModuleList(
            InvertedBlock(width * before, width * size, stride)
            for before, (size, stride) in zip(inputs, sizes, strict=False)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


JOBS = {
    "latents": lambda: make(
        functools.partial(Latents, 32, 32, 128, 4, 4),
        functools.partial(labelled, (128, 32), 10),
        class_loss,
        adamw,
        32,
    ),
    "mobile": lambda: make(
        functools.partial(Mobile, 24), functools.partial(labelled, (3, 32, 32), 10), class_loss, sgd, 32
    ),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
