"""Three jobs on a device that only waits: many hosts on few cores, none of which has to pause.

    paceline train benchmarks/waiting_jobs.py --set model=mlp

Each block computes a little, for real, and then waits for as long as a slower device would take for its samples, in its
forward and in its backward pass; a processor is free meanwhile, as it is where a GPU computes. Gradients, messages and
sockets are real. Eight hosts that share two cores so take turns seldom; with quotas of processor time they would stand
still for most of every period, and what they exchange would wait with them (docs/forecasts.md).

`--set model=` chooses one; on one worker a step waits for 0.4 seconds:

    mlp     eight residual blocks of width 128 (0.3 M parameters), 32 rows, AdamW: much to add up, little to hand on
    gpt     six blocks of width 64 (0.3 M parameters), 16 windows of 16 tokens, AdamW
    conv    six residual convolutions (60 thousand parameters), 16 images 24×12×12, SGD: the other way round
"""

from __future__ import annotations

import functools
import time

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
STEP_S = 0.4
"""Of waiting, for the whole batch: a third in forward passes."""
LAUNCH_S = 1e-4
"""Of waiting, in each pass of each block, however few samples it has."""


class Device:
    """What takes so long."""

    def __init__(self, blocks: int, batch_size: int) -> None:
        self._forward_s = STEP_S / 3 / blocks / batch_size

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Waits for a forward pass of the samples of `x`; and for a backward pass when gradients of `x` come.

        Call it on what a block has inside: what comes to its outputs comes before its backward pass begins.
        """
        if type(x) is not torch.Tensor or x.is_meta:
            # Someone wants to know its shape.
            return x
        forward_s = self._forward_s * len(x)
        time.sleep(LAUNCH_S + forward_s)
        if x.requires_grad:
            x.register_hook(lambda gradient: time.sleep(LAUNCH_S + 2 * forward_s))
        return x


class Perceptron(nn.Module):
    """[b, width] -> [b, width]."""

    def __init__(self, width: int, device: Device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self._device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self._device.compute(F.gelu(self.up(self.norm(x)))))


class Layer(nn.Module):
    """A transformer's block that sees all positions, [b, t, width] -> [b, t, width]."""

    def __init__(self, width: int, device: Device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self._device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self._device.compute(self.norm(x)))


class GPT(nn.Module):
    """Tokens [b, t] -> scores of the next token [b, t, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, blocks: int, device: Device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, device) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Convolutions(nn.Module):
    """[b, channels, n, n] -> the same."""

    def __init__(self, channels: int, device: Device) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self._device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self._device.compute(F.relu(self.first(x))))


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
