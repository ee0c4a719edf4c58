"""Trains a convolutional net in several layouts, its images with their channels last; each worker tells what it saw."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

import paceline
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.train.image_format import agree_on_images
from paceline.train.session import Datasets, Session


def batch_norm() -> nn.Module:
    return nn.BatchNorm2d(8)


def group_norm() -> nn.Module:
    return nn.GroupNorm(4, 8)


class Network(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), norm(), nn.Tanh()) for i in (3, 8, 8, 8))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def images(split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(len(split))
    return TensorDataset(torch.randn(24, 3, 12, 12, generator=generator), torch.arange(24) % 10)


class Stream(IterableDataset):
    """It can be read once, and is not to be read before the training."""

    def __iter__(self):
        raise AssertionError("it was read")


JOB = paceline.Job(
    model=functools.partial(Network, batch_norm), data=images, loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), batch_size=8, steps=3,
)  # fmt: skip


def turned_network() -> nn.Module:
    """Its weights have their channels last."""
    return Network(group_norm).to(memory_format=torch.channels_last)


def train_layouts(
    world: World,
    layouts: list[str],
    *,
    is_turned: bool,
    norm: Callable[[], nn.Module] = batch_norm,
    **settings: Any,
) -> dict[str, tuple[list[float], int, int]]:
    """By layout: losses, how many inputs of convolutions came here, and how many of them with their channels last."""
    job = dataclasses.replace(JOB, **{"model": functools.partial(Network, norm), **settings})
    everyone = world.group(world.size)
    found = {}
    for text in layouts:
        layout = Layout.parse(text)
        mesh = make_mesh(world, layout)
        if mesh is None:
            everyone.barrier("between layouts")
            continue
        datasets = Datasets(job, 7)
        datasets.images.decide(0.5 if is_turned else None)
        session = Session(job, layout, seed=7, world=world, mesh=mesh, datasets=datasets)
        seen: list[bool] = []

        def see(module: nn.Module, args: tuple[torch.Tensor], into: list[bool] = seen) -> None:
            if not args[0].is_meta and not isinstance(args[0], FakeTensor):
                into.append(args[0].is_contiguous(memory_format=torch.channels_last))

        for module in session.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(see)
        losses = [session.step(batch).loss for batch in session.batches()]
        losses += session.evaluate().values()
        found[text] = losses, len(seen), sum(seen)
        everyone.barrier("between layouts")
    return found


def agree(world: World) -> list[float | None]:
    """What this worker holds to be found out; batches so small are not tried, and larger ones are on rank 0 alone."""
    from paceline.train import images as rules

    found = []
    for least in (rules.LEAST_NUMEL, 100):
        rules.LEAST_NUMEL = least
        rules.MOST_RATIO = 1e9
        datasets = Datasets(JOB, 7)
        everyone = world.group(world.size)
        agree_on_images(JOB, datasets, world, everyone, seed=7, precision="fp32")
        assert datasets.images.is_decided
        found.append(datasets.images.ratio)
    stream = dataclasses.replace(JOB, data=lambda split: Stream())
    datasets = Datasets(stream, 7)
    agree_on_images(stream, datasets, world, everyone, seed=7, precision="fp32")
    assert not datasets.images.is_decided
    return found
