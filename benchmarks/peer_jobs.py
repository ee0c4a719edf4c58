"""Five jobs on random data that any program can be asked to train: for comparing programs, not for learning.

    paceline train benchmarks/peer_jobs.py --set model=gpt-small

`--set model=` chooses one:

    gpt-small   a GPT of 1.2 M parameters, 16 windows of 64 tokens in a global batch, AdamW
    gpt-30m     a GPT of 29 M parameters, 8 windows of 64 tokens, AdamW
    conv        six convolutions with BatchNorm on 64 images 3×32×32, SGD with momentum
    mlp-tiny    a perceptron 20-64-64-2 on 64 rows, AdamW
    mlp-wide    four linear layers of 4096 (67 M parameters) on 16 rows, AdamW: mostly the optimizer's work

The data are a function of a fixed seed (random_jobs.py). No model has dropout, so that losses can be compared to the
last digits.
"""

from __future__ import annotations

import functools
import itertools

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

options = paceline.options(model="gpt-small")


class Block(nn.Module):
    """Attention, then a multilayer perceptron; each is normalised first and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:  # b: window, t: position, d: width
        b, t, d = x_btd.shape
        q, k, v = self.qkv(self.attention_norm(x_btd)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_btd = x_btd + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x_btd + self.down(F.gelu(self.up(self.mlp_norm(x_btd))))


class GPT(nn.Module):
    """Tokens [b, t] -> scores of the next token [b, t, vocabulary]; the head is the table of the tokens."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x_btd = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.norm(x_btd))


class ConvNet(nn.Module):
    """Images [b, 3, 32, 32] -> scores of 10 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [3, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels[1:])
        self.leave = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if number % 2:
                x = F.max_pool2d(x, 2)
        return self.leave(x.mean((2, 3)))


class MLP(nn.Module):
    """Rows [b, widths[0]] -> [b, widths[-1]]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


JOBS = {
    "gpt-small": lambda: make(
        functools.partial(GPT, 128, 6, 4, 512, 64), functools.partial(tokens, 512, 64),
        next_token_loss, adamw, 16,
    ),
    "gpt-30m": lambda: make(
        functools.partial(GPT, 512, 6, 8, 20_000, 64), functools.partial(tokens, 20_000, 64),
        next_token_loss, adamw, 8,
    ),
    "conv": lambda: make(
        functools.partial(ConvNet, 24), functools.partial(labelled, (3, 32, 32), 10), class_loss, sgd, 64
    ),
    "mlp-tiny": lambda: make(
        functools.partial(MLP, (20, 64, 64, 2)), functools.partial(labelled, (20,), 2), class_loss, adamw, 64
    ),
    "mlp-wide": lambda: make(
        functools.partial(MLP, (4096,) * 5), functools.partial(regression, 4096), squared_loss, adamw, 16
    ),
}  # fmt: skip
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
