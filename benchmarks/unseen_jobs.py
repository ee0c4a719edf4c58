"""Six jobs on random data with whose cells in sight nothing in the planner was ever changed.

    paceline train benchmarks/unseen_jobs.py --set model=latents

`--set model=` chooses one:

    latents 32 vectors that four times look at 128 inputs and at each other (1.1 M parameters), 32 sets, AdamW
    experts four layers of attention, behind each of which four experts are asked, all of them by some part (1.5 M
            parameters), 16 windows of 48 tokens, AdamW
    fourier four layers that weigh the slow waves of a field, and each point by itself (1.3 M parameters), 16 fields
            32×32, AdamW
    retention   four layers in which each token remembers those before it, the older the less (0.9 M parameters), 16
            windows of 64 tokens, AdamW
    squeeze eight residual blocks of grouped convolutions whose channels are weighed by their means, on two scales
            (0.2 M parameters), 32 images 3×32×32, SGD with momentum
    splines five layers of sums of bumps of each input (1.0 M parameters), 256 rows, AdamW

Once one of their cells has led to a change they belong to held_out_jobs.py, and others come here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from random_jobs import adamw, class_loss, labelled, make, next_token_loss, sgd, tokens
from torch import nn
from torch.nn import functional as F

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


class OverTokens(nn.Module):
    """Tokens [b, t] -> scores [b, t, vocabulary], through layers that keep the shape [b, t, width]."""

    def __init__(self, vocabulary: int, width: int, layers: int, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class FourierLayer(nn.Module):
    """Fields [b, width, n, n] -> the same: some waves are mixed over channels, and so is each point."""

    def __init__(self, width: int, waves: int) -> None:
        super().__init__()
        self.waves = waves
        # Of waves that rise and that fall along the first side; real and imaginary parts.
        self.weight = nn.Parameter(torch.randn(2, width, width, waves, waves, 2) / width)
        self.each = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found, weight, n = torch.fft.rfft2(x), torch.view_as_complex(self.weight), self.waves
        mixed = torch.zeros_like(found)
        mixed[:, :, :n, :n] = torch.einsum("bihw,iohw->bohw", found[:, :, :n, :n], weight[0])
        mixed[:, :, -n:, :n] = torch.einsum("bihw,iohw->bohw", found[:, :, -n:, :n], weight[1])
        return F.gelu(torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.each(x))


class RetentionLayer(nn.Module):
    """Tokens [b, t, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.seen = nn.Linear(width, 3 * width, bias=False)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.register_buffer("kept", 1 - 2.0 ** -(4 + torch.arange(heads, dtype=torch.float32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        y = self.norm(x)
        asked, told, value = (
            part.view(b, t, self.heads, width // self.heads).transpose(1, 2)
            for part in self.seen(y).chunk(3, -1)
        )
        at = torch.arange(t, device=x.device)
        since = (at[:, None] - at).clamp(min=0)
        left = self.kept[:, None, None] ** since * (at[:, None] >= at)
        found = (asked @ told.transpose(-1, -2) * left / (width // self.heads) ** 0.5) @ value
        found = F.layer_norm(found, found.shape[-1:]).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(found * F.silu(self.gate(y)))
        a, c = self.up(self.last_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(a) * c)


class SqueezeBlock(nn.Module):
    """Images [b, width, h, w] -> the same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.GroupNorm(8, width),
        )
        self.weigh = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolve(x)
        return F.relu(x + y * self.weigh(y.mean((2, 3)))[:, :, None, None])


def squeeze(width: int, groups: int, blocks: int) -> nn.Module:
    """Images [b, 3, n, n] -> scores of 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        *(SqueezeBlock(width, groups) for _ in range(blocks)),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        *(SqueezeBlock(2 * width, groups) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class SplineLayer(nn.Module):
    """Rows [b, inputs] -> [b, outputs]: each output a sum of curves, one of each input."""

    def __init__(self, inputs: int, outputs: int, bumps: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.register_buffer("centres", torch.linspace(-2, 2, bumps))
        self.sum = nn.Linear(inputs * bumps, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        away = (self.norm(x)[..., None] - self.centres) * (len(self.centres) / 4)
        return self.sum(torch.exp(-away.square()).flatten(-2))


def splines(inputs: int, width: int, layers: int, bumps: int) -> nn.Module:
    """Rows [b, inputs] -> scores of 10 classes."""
    sizes = [inputs, *[width] * (layers - 1), 10]
    return nn.Sequential(*(SplineLayer(a, b, bumps) for a, b in itertools.pairwise(sizes)))


class Fourier(nn.Sequential):
    """Fields [b, 1, n, n] -> scores of 10 classes."""

    def __init__(self, width: int, waves: int, layers: int) -> None:
        super().__init__(
            nn.Conv2d(1, width, 1),
            *(FourierLayer(width, waves) for _ in range(layers)),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, 10),
        )


JOBS = {
    "latents": lambda: make(
        functools.partial(Latents, 32, 32, 128, 4, 4),
        functools.partial(labelled, (128, 32), 10),
        class_loss,
        adamw,
        32,
    ),
    "experts": lambda: make(
        functools.partial(OverTokens, 512, 128, 4, functools.partial(ExpertsLayer, 128, 4, 4)),
        functools.partial(tokens, 512, 48),
        next_token_loss,
        adamw,
        16,
    ),
    "fourier": lambda: make(
        functools.partial(Fourier, 32, 9, 4),
        functools.partial(labelled, (1, 32, 32), 10),
        class_loss,
        adamw,
        16,
    ),
    "retention": lambda: make(
        functools.partial(OverTokens, 512, 128, 4, functools.partial(RetentionLayer, 128, 4)),
        functools.partial(tokens, 512, 64),
        next_token_loss,
        adamw,
        16,
    ),
    "squeeze": lambda: make(
        functools.partial(squeeze, 48, 8, 4),
        functools.partial(labelled, (3, 32, 32), 10),
        class_loss,
        sgd,
        32,
    ),
    "splines": lambda: make(
        functools.partial(splines, 64, 192, 5, 8),
        functools.partial(labelled, (64,), 10),
        class_loss,
        adamw,
        256,
    ),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
