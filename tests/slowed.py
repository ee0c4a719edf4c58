"""A job whose steps wait for each sample; a file says how many times as long on each rank, and may change meanwhile.

As if other programs had taken a worker's core; as nothing is computed while it waits, real ones change little of it.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

options = paceline.options(slower="", sample_s=0.004)


def factor() -> float:
    if not options.slower or not Path(options.slower).exists():
        return 1.0
    return float(Path(options.slower).read_text().split()[int(os.environ.get("RANK", 0))])


def slow_down(slower: Path, factors: str) -> None:
    """Write the file as a whole: workers read it all the time."""
    partial = slower.with_suffix(".partial")
    partial.write_text(factors)
    partial.replace(slower)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(options.sample_s * len(x) * factor())
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
    evaluate_every_steps=50,
    showcase=lambda model: {"weight": float(model.inner.weight.detach().sum())},
)
