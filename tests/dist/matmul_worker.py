"""Trains a network of large products in several layouts; each worker tells what multiplied them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

import paceline
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.train.matmul import Matmul, num_products, use_onednn
from paceline.train.matmul_choice import agree_on_matmul
from paceline.train.session import Datasets, Session


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512)) for _ in range(2))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def rows(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(len(split))
    return TensorDataset(torch.randn(96, 512, generator=generator), torch.randn(96, 512, generator=generator))


class Stream(IterableDataset):
    """It can be read once, and is not to be read before the training."""

    def __iter__(self):
        raise AssertionError("it was read")


JOB = paceline.Job(
    model=Network, data=rows, loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
    optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), batch_size=32, steps=3,
)  # fmt: skip


def train_layouts(
    world: World, layouts: list[str], *, with_onednn: bool
) -> dict[str, tuple[list[float], int]]:
    """By layout: losses, and how many products oneDNN carried out here."""
    everyone = world.group(world.size)
    found = {}
    for text in layouts:
        layout = Layout.parse(text)
        mesh = make_mesh(world, layout)
        datasets = Datasets(JOB, 7)
        use_onednn(False)
        datasets.matmul.decide(0.5 if with_onednn else None)
        session = Session(JOB, layout, seed=7, world=world, mesh=mesh, datasets=datasets)
        losses = [session.step(batch).loss for batch in session.batches()]
        found[text] = losses, num_products()
        everyone.barrier("between layouts")
    return found


def agree(world: World) -> list[float | None]:
    """What this worker holds to be found out: as it comes, where rank 0 finds a gain, and of a stream."""
    everyone = world.group(world.size)
    found = []
    for ratio in (None, 0.25):
        Matmul.measure = lambda self, run, ratio=ratio: (run(), ratio)[1]
        datasets = Datasets(JOB, 7)
        agree_on_matmul(JOB, datasets, world, everyone, seed=7)
        assert datasets.matmul.is_decided
        found.append(datasets.matmul.ratio)
    datasets = Datasets(dataclasses.replace(JOB, data=lambda split: Stream()), 7)
    agree_on_matmul(JOB, datasets, world, everyone, seed=7)
    assert datasets.matmul.is_decided
    return [*found, datasets.matmul.ratio]
