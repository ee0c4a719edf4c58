"""What jobs on random data are made of: data sets from a fixed seed, losses, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

NUM_SAMPLES = 2048
DATA_SEED = 20_000


def tokens(vocabulary: int, context: int, generator: torch.Generator) -> TensorDataset:
    drawn = torch.randint(vocabulary, (NUM_SAMPLES, context + 1), generator=generator)
    return TensorDataset(drawn[:, :-1], drawn[:, 1:])


def labelled(shape: tuple[int, ...], classes: int, generator: torch.Generator) -> TensorDataset:
    inputs = torch.randn(NUM_SAMPLES, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(classes, (NUM_SAMPLES,), generator=generator))


def regression(width: int, generator: torch.Generator) -> TensorDataset:
    return TensorDataset(*torch.randn(2, NUM_SAMPLES, width, generator=generator))


def next_token_loss(scores: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten())


def class_loss(scores: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(scores, batch[1])


def squared_loss(outputs: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(outputs, batch[1])


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-4, weight_decay=0.01)


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def make(
    model: Callable[[], nn.Module],
    data: Callable[[torch.Generator], TensorDataset],
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    batch_size: int,
) -> paceline.Job:
    def build(split: str) -> TensorDataset:
        dataset = data(torch.Generator().manual_seed(DATA_SEED))
        return dataset if split == "train" else TensorDataset(*dataset[:batch_size])

    return paceline.Job(
        model=model, data=build, loss=loss, optimizer=optimizer, batch_size=batch_size, steps=20
    )
