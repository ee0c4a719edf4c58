"""Jobs whose training moves from layout to layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jobs import Points, Stream, cross_entropy, data_of, plain
from torch import nn

STEPS = 3
"""In each layout."""


class Network(nn.Module):
    """Blocks, batch norm, a frozen layer, one that no sample uses, and one parameter that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16)) for _ in range(4)
        )
        self.unused = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.outer = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(torch.tanh(self.inner(x)))
        for block in self.blocks:
            h = h + block(h)
        return self.outer(h * self.scale)


def momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> Any:
    """Two groups with settings of their own."""
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "lr": 0.01}, {"params": others, "weight_decay": 0.0}], lr=0.003)


def warm_up_and_decay(optimizer: Any, total_steps: int) -> Any:
    """A schedule of two others."""
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 4)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [4])


class Countdown:
    """A schedule that is none of torch's, and tells nothing of itself."""

    def __init__(self, optimizer: Any, total_steps: int) -> None:
        self._optimizer, self._left = optimizer, total_steps

    def step(self) -> None:
        self._left -= 1
        for group in self._optimizer.param_groups:
            group["lr"] = 0.001 * self._left


base = dataclasses.replace(plain, model=Network, data=data_of(Points), loss=cross_entropy, epochs=100)

MOVING_JOBS = {
    "momentum": dataclasses.replace(base, optimizer=momentum, schedule=Countdown, data=data_of(Stream)),
    "adamw": dataclasses.replace(base, optimizer=adamw, schedule=warm_up_and_decay, clip_norm=0.5),
    "adafactor": dataclasses.replace(base, optimizer=torch.optim.Adafactor),
}
