"""Two jobs on random data with whose cells in sight nothing in the planner was ever changed.

    paceline train benchmarks/unseen_jobs.py --set model=latents

`--set model=` chooses one:

    latents 32 vectors that four times look at 128 inputs and at each other (1.1 M parameters), 32 sets, AdamW
    experts four layers of attention, behind each of which four experts are asked, all of them by some part (1.5 M
            parameters), 16 windows of 48 tokens, AdamW

Once one of their cells has led to a change they belong to held_out_jobs.py, and others come here.
"""

from __future__ import annotations

import functools

import torch
from random_jobs import adamw, class_loss, labelled, make, next_token_loss, tokens
from torch import nn

import paceline

options = paceline.options(model="latents")


class LookingLayer(nn.Module):
    """Latents [b, l, width] and inputs [b, n, width] -> latents."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.input_norm, self.norm, self.own_norm, self.last_norm = (nn.LayerNorm(width) for _ in range(4))
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        self.among = nn.MultiheadAttention(width, heads, batch_first=True)
        self.each = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.input_norm(inputs)
        x = latents + self.across(self.norm(latents), inputs, inputs, need_weights=False)[0]
        y = self.own_norm(x)
        x = x + self.among(y, y, y, need_weights=False)[0]
        return x + self.each(self.last_norm(x))


class Latents(nn.Module):
    """Inputs [b, n, features] -> scores of 10 classes."""

    def __init__(self, features: int, number: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.latents = nn.Parameter(0.02 * torch.randn(1, number, width))
        self.layers = nn.ModuleList(LookingLayer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.head(latents.mean(1))


class ExpertsLayer(nn.Module):
    """Tokens [b, t, width] -> the same: each sees those before it, and then every expert, by how much it is asked."""

    def __init__(self, width: int, heads: int, experts: int) -> None:
        super().__init__()
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
        y = self.last_norm(x)
        asked = self.gate(y).softmax(-1)
        for number, expert in enumerate(self.experts):
            x = x + asked[..., number, None] * expert(y)
        return x


class Experts(nn.Module):
    """Tokens [b, t] -> scores [b, t, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, experts: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(ExpertsLayer(width, heads, experts) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


JOBS = {
    "latents": lambda: make(
        functools.partial(Latents, 32, 32, 128, 4, 4),
        functools.partial(labelled, (128, 32), 10),
        class_loss,
        adamw,
        32,
    ),
    "experts": lambda: make(
        functools.partial(Experts, 512, 128, 4, 4, 4),
        functools.partial(tokens, 512, 48),
        next_token_loss,
        adamw,
        16,
    ),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
