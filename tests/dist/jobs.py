"""Small jobs, one for each thing that goes wrong when a batch is split."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

import paceline

BATCH_SIZE = 24
LONG, SHORT = 77, 73
"""Lengths whose last batches hold 5 and 1 samples: some of four workers have none of them."""


class Recorder(torch.optim.SGD):
    """SGD with momentum and weight decay that keeps the gradients of its first two steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05, momentum=0.9, weight_decay=0.01)
        self.seen: list[list[torch.Tensor | None]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if len(self.seen) < 2:
            parameters = self.param_groups[0]["params"]
            self.seen.append([None if p.grad is None else p.grad.clone() for p in parameters])
        super().step(closure)


class Points(Dataset):  # type: ignore[type-arg]
    """`length` points of 12 numbers with a class out of 4."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 12, generator=generator)
        self.y = (self.x[:, :4] * 2).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, length: int, seed: int) -> None:
        self.points = Points(length, seed)

    def __iter__(self) -> Any:
        return (self.points[i] for i in range(len(self.points)))


class Sentences(Points):
    """Token sequences of 8, padded with 0: every sample has another number of real tokens."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randint(1, 16, (length, 8), generator=generator)
        lengths = torch.randint(1, 9, (length, 1), generator=generator)
        self.x[torch.arange(8) >= lengths] = 0
        self.y = self.x.roll(-1, 1)
        self.y[:, -1] = 0


class Images(Points):
    def __init__(self, length: int, seed: int) -> None:
        super().__init__(length, seed)
        # Means that differ from sample to sample: statistics of a share are not those of the batch.
        offset = torch.linspace(-2, 2, length).view(-1, 1, 1, 1)
        self.x = self.x.view(length, 3, 2, 2) + offset


def data_of(kind: type, length: int = LONG, held_out: int = 31) -> Any:
    return lambda split: kind(length, 1) if split == "train" else kind(held_out, 2)


def cross_entropy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.BatchNorm2d(8, momentum=None, affine=False),
        nn.Flatten(),
        nn.Linear(32, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )


def without_statistics() -> nn.Module:
    """Held-out batches are normalised by their own statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class Language(nn.Module):
    """Input and output embeddings are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 10)
        self.mix = nn.Linear(10, 10)
        self.head = nn.Linear(10, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x))))


class Experts(nn.Module):
    """Each sample uses one of three experts by its class; a fourth is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = (x[:, 0] > 1.3).long() + (x[:, 0] > 1.8).long()
        result = x.new_zeros(len(x), 4)
        for number in choice.unique().tolist():
            chosen = choice == number
            result = result.index_put((chosen.nonzero()[:, 0],), self.experts[number](x[chosen]))
        return result


def padded_loss(outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    target = batch[1]
    total = F.cross_entropy(outputs.flatten(0, 1), target.flatten(), ignore_index=0, reduction="sum")
    return total, (target != 0).sum()


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 4))


def frozen_part() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def decaying(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_steps)


plain = paceline.Job(
    model=mlp,
    data=data_of(Points),
    loss=cross_entropy,
    optimizer=Recorder,
    batch_size=BATCH_SIZE,
    epochs=3,
    metrics={"accuracy": lambda outputs, batch: (outputs.argmax(1) == batch[1]).float().mean()},
)

JOBS: dict[str, tuple[paceline.Job, int]] = {
    "plain": (plain, 1),
    "schedule": (dataclasses.replace(plain, schedule=decaying), 1),
    "weighted": (
        dataclasses.replace(plain, model=Language, data=data_of(Sentences), loss=padded_loss, metrics={}),
        1,
    ),
    "weighted_micro": (
        dataclasses.replace(plain, model=Language, data=data_of(Sentences), loss=padded_loss, metrics={}),
        2,
    ),
    "batch_norm": (dataclasses.replace(plain, model=convolutional, data=data_of(Images)), 1),
    "batch_norm_single_sample": (
        dataclasses.replace(plain, model=convolutional, data=data_of(Images, SHORT + 1)),
        1,
    ),
    "batch_norm_micro": (dataclasses.replace(plain, model=convolutional, data=data_of(Images)), 2),
    "batch_norm_without_statistics": (
        # Three held-out samples: one of four workers has none.
        dataclasses.replace(plain, model=without_statistics, data=data_of(Images, held_out=3)),
        1,
    ),
    "clipped": (dataclasses.replace(plain, clip_norm=0.05), 1),
    "clipped_weighted": (
        dataclasses.replace(
            plain, model=Language, data=data_of(Sentences), loss=padded_loss, metrics={}, clip_norm=0.05
        ),
        1,
    ),
    "micro": (plain, 2),
    "tied": (
        dataclasses.replace(
            plain,
            model=Language,
            data=data_of(Sentences),
            loss=lambda outputs, batch: F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten()),
            metrics={},
        ),
        1,
    ),
    "unused": (dataclasses.replace(plain, model=Experts, data=data_of(Points, SHORT)), 1),
    "frozen": (dataclasses.replace(plain, model=frozen_part), 1),
    "iterable": (dataclasses.replace(plain, data=data_of(Stream)), 1),
    "one_sample_last": (dataclasses.replace(plain, data=data_of(Points, SHORT)), 1),
    "dropout": (dataclasses.replace(plain, model=with_dropout), 1),
}
"""name -> (job, micro)"""
