"""Three jobs on a device that only waits: many hosts on few cores, none of which has to pause.

    paceline train benchmarks/waiting_jobs.py --set model=mlp

Each block computes a little, for real, and then waits until as much time has passed as a slower device would take for
its samples, in its forward and in its backward pass; a processor is free meanwhile, as it is where a GPU computes.
Gradients, messages and sockets are real. Eight hosts that share two cores so seldom stand in line, and where they do it
counts as the device's work; with quotas of processor time they would stand still for most of every period, and what
they exchange would wait with them (docs/forecasts.md).

`--set model=` chooses one; on one worker a step takes 0.6 seconds:

    mlp     eight residual blocks of width 128 (0.3 M parameters), 32 rows, AdamW: much to add up, little to hand on
    gpt     six blocks of width 64 (0.3 M parameters), 16 windows of 16 tokens, AdamW
    conv    six residual convolutions (60 thousand parameters), 16 images 24×12×12, SGD: the other way round
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_jobs import (
    adamw,
    class_loss,
    labelled,
    make,
    next_token_loss,
    regression,
    sgd,
    squared_loss,
    tokens,
)
from torch import nn
from torch.nn import functional as F

import paceline

options = paceline.options(model="mlp")
_Rest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
STEP_S = 0.6
"""Of the device's work for the whole batch: a third in forward passes."""
LAUNCH_S = 1e-4
"""Of its work in each pass of each block, however few samples it has."""


class Device:
    """What takes so long."""

    def __init__(self, blocks: int, batch_size: int) -> None:
        self._forward_s = STEP_S / 3 / blocks / batch_size

    def run(
        self, first: Callable[[torch.Tensor], torch.Tensor], rest: _Rest, x: torch.Tensor
    ) -> torch.Tensor:
        """`rest(x, first(x))`, a block, in as long as the device takes for it; its backward pass likewise."""
        begin_s = _at_work_s()
        inner = first(x)
        y = rest(x, inner)
        if type(y) is not torch.Tensor or y.is_meta:
            # Someone wants to know its shape.
            return y
        forward_s = LAUNCH_S + self._forward_s * len(x)
        _wait(forward_s, begin_s)
        if y.requires_grad:
            begun_s = [0.0]
            y.register_hook(lambda gradient: begun_s.__setitem__(0, _at_work_s()))
            inner.register_hook(lambda gradient: _wait(2 * forward_s, begun_s[0]))
        return y


def _wait(seconds: float, begin_s: float) -> None:
    """So long, less what this thread has been at work since `begin_s`."""
    time.sleep(max(0.0, seconds - (_at_work_s() - begin_s)))


def _at_work_s() -> float:
    """How long this thread has run, or stood in line for a processor, which with a host of its own it would not."""
    ran_ns, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(ran_ns) + int(waited_ns)) * 1e-9


class Block(nn.Module):
    """[b, …, width] -> the same: what `_rest` makes of the block's inputs and their norm."""

    def __init__(self, norm: nn.Module, device: Device) -> None:
        super().__init__()
        self.norm = norm
        self._device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.run(self.norm, self._rest, x)

    def _rest(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Perceptron(Block):
    """[b, width] -> [b, width]."""

    def __init__(self, width: int, device: Device) -> None:
        super().__init__(nn.LayerNorm(width), device)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def _rest(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(normed)))


class Attention(Block):
    """A transformer's block that sees all positions, [b, t, width] -> [b, t, width]."""

    def __init__(self, width: int, device: Device) -> None:
        super().__init__(nn.LayerNorm(width), device)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _rest(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.attention(normed, normed, normed, need_weights=False)
        return x + mixed + self.down(F.gelu(self.up(normed)))


class GPT(nn.Module):
    """Tokens [b, t] -> scores of the next token [b, t, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, blocks: int, device: Device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Attention(width, device) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Convolutions(Block):
    """[b, channels, n, n] -> the same."""

    def __init__(self, channels: int, device: Device) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), device)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def _rest(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(normed))


def mlp(blocks: int, batch_size: int) -> nn.Module:
    device = Device(blocks, batch_size)
    return nn.Sequential(*(Perceptron(128, device) for _ in range(blocks)))


def gpt(blocks: int, batch_size: int) -> nn.Module:
    return GPT(256, 64, blocks, Device(blocks, batch_size))


def conv(blocks: int, batch_size: int) -> nn.Module:
    device = Device(blocks, batch_size)
    layers = [Convolutions(24, device) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


JOBS = {
    "mlp": lambda: make(
        functools.partial(mlp, 8, 32), functools.partial(regression, 128), squared_loss, adamw, 32
    ),
    "gpt": lambda: make(
        functools.partial(gpt, 6, 16), functools.partial(tokens, 256, 16), next_token_loss, adamw, 16
    ),
    "conv": lambda: make(
        functools.partial(conv, 6, 16), functools.partial(labelled, (24, 12, 12), 10), class_loss, sgd, 16
    ),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
