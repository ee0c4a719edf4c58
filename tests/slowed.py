"""A job whose steps wait for each sample; on rank 1 four times as long from the moment that a file is there.

As if another program had taken that worker's core, and whatever else runs on the machine: nothing is computed meanwhile.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

options = paceline.options(slow_file="", sample_s=0.002, slower=8.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            is_slow = os.environ.get("RANK") == "1" and options.slow_file and Path(options.slow_file).exists()
            time.sleep(options.sample_s * len(x) * (options.slower if is_slow else 1.0))
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def data(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(len(split))
    x = torch.randn(125 if split == "train" else 20, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


job = paceline.Job(
    model=Model,
    data=data,
    loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.003),
    schedule=lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    clip_norm=1.0,
    batch_size=12,
    steps=400,
    evaluate_every_steps=100,
)
