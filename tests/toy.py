"""A job that trains in a moment, and that a test may ask to go wrong: `--set mode=...`."""

import os
import signal
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import paceline

options = paceline.options(
    mode="train",
    rank=1,
    at_forward=4,
    length=60,
    batch_size=12,
    width=16,
    step_s=0.0,
    loader_workers=0,
    statistics=1,
)


class Points(Dataset):
    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 8, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if options.mode == "bad_sample" and index == 40:
            raise OSError("the disk is gone")
        return self.x[index], self.y[index]


class Unseen(nn.Module):
    """It scales features by a function that torch does not show, as a compiled kernel would."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(options.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return x * self.scale


class Model(nn.Module):
    """Two layers; on rank `rank`, its forward pass number `at_forward` does what `mode` says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, options.width)
        self.norm = nn.BatchNorm1d(options.width, track_running_stats=bool(options.statistics))
        self.unseen = Unseen() if options.mode == "unseen" else nn.Identity()
        self.outer = nn.Linear(options.width, 2)
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_forwards += 1
            time.sleep(options.step_s)
        if self.num_forwards == options.at_forward and os.environ.get("RANK") == str(options.rank):
            misbehave()
        if options.mode == "narrow":  # insists on float32
            x = x @ torch.eye(8, dtype=torch.float32)
        if options.mode == "random" and self.training:  # noise of its own, which no switch turns off
            x = x + torch.rand_like(x)
        return self.outer(torch.tanh(self.unseen(self.norm(self.inner(x)))))


def misbehave() -> None:
    if options.mode == "raise":
        raise ValueError("a planted error")
    if options.mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if options.mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if options.mode == "exit":
        os._exit(3)


def loss(outputs: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    if options.mode == "vector_loss":
        return F.cross_entropy(outputs, batch[1], reduction="none")
    if options.mode == "number_loss":
        return F.cross_entropy(outputs, batch[1]).item()
    if options.mode == "detached_loss":
        return F.cross_entropy(outputs, batch[1]).detach()
    if options.mode == "nan_loss":
        return F.cross_entropy(outputs, batch[1]) * float("nan")
    if options.mode == "wrong_shape":
        return F.cross_entropy(outputs, batch[1][:1])
    if options.mode in (
        "contrast",
        "narrow",
    ):  # every sample against the others of its batch: no mean over samples
        similar = (outputs @ outputs.T).fill_diagonal_(-1e9)
        same = (batch[1][:, None] == batch[1]).float().fill_diagonal_(0)
        return -(similar.log_softmax(1) * same).sum(1).mean()
    return F.cross_entropy(outputs, batch[1])


def data(split: str) -> Dataset:
    if options.mode == "data_raises":
        raise FileNotFoundError("no such file: points.csv")
    return Points({"train": options.length, "test": 31}[split], {"train": 1, "test": 2}[split])


def showcase(model: nn.Module) -> dict[str, float | str]:
    output = model(torch.ones(3, 8)).sum().item()
    return {"weight": model.inner.weight.sum().item(), "output": output, "words": "<b>trained</b>"}


def drifting_sgd(params) -> torch.optim.Optimizer:
    params = list(params)
    if options.mode == "drift":

        class Drifting(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                with torch.no_grad():
                    params[0] += 1e-3 * int(os.environ.get("RANK", 0))

        return Drifting(params, lr=0.1)
    return torch.optim.SGD(params, lr=0.1)


job = paceline.Job(
    model=Model,
    data=data,
    loss=loss,
    optimizer=drifting_sgd,
    batch_size=options.batch_size,
    epochs=3,
    evaluate_every_steps=4,
    metrics={"accuracy": lambda outputs, batch: (outputs.argmax(1) == batch[1]).float().mean()},
    showcase=showcase,
    loader_workers=options.loader_workers,
)
