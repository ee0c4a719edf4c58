"""Fifteen jobs on random data, held out from the planner until they were not, to hold its forecasts against.

    paceline train benchmarks/held_out_jobs.py --set model=lstm

`--set model=` chooses one:

    vit     an encoder of 6 layers over the 64 patches of an image (2.7 M parameters), 16 images 3×32×32, AdamW
    lstm    two recurrent layers of 256 (1.3 M parameters), 32 windows of 48 tokens, AdamW
    unet    three scales with skip connections and group norm (0.3 M parameters), 8 images 3×64×64, SGD with momentum
    mixer   eight layers that mix 64 patches, then 128 channels (0.7 M parameters), 32 images 3×32×32, AdamW
    autoencoder   four convolutions down and four up again (0.3 M parameters), 32 images 3×32×32, SGD with momentum
    tcn     six convolutions along a sequence, ever wider apart (0.7 M parameters), 32 windows of 64 tokens, AdamW
    sets    three layers for each of 48 points, their mean, three layers for that (0.3 M parameters), 64 sets, AdamW
    tables  eight tables of 4,096 rows, looked up and joined, four residual layers (1.6 M parameters), 256 rows, AdamW
    graph   six layers of messages between 64 points, weighted by how near they are (0.4 M parameters), 16 graphs, SGD
    seq2seq three layers that read a sentence, three that write one and look at it (1.6 M parameters), 16 pairs, AdamW
    resnet  six residual blocks of convolutions with batch norm on three scales (0.4 M parameters), 32 images, SGD
    towers  two tables of 8,192 rows, three layers behind each, their product (1.1 M parameters), 512 pairs, AdamW
    mobile  eight residual blocks of convolutions of one channel each between such of one pixel, on three scales
            (0.3 M parameters), 32 images 3×32×32, SGD with momentum
    dense   three blocks of four convolutions, each of which sees what all before it have made (0.1 M parameters), 32
            images 3×32×32, SGD with momentum
    pyramid convolutions on four scales, and back again from the smallest, joined with each (0.8 M parameters), 16
            images 3×64×64, SGD with momentum

Until 2026-11-27 nothing in the planner was changed with cells of the first three in sight, until 2026-11-28 with those
of the others but for the last five, and with those until 2026-11-30. Who has taken their place: unseen_jobs.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from random_jobs import (
    NUM_SAMPLES,
    adamw,
    class_loss,
    labelled,
    make,
    next_token_loss,
    sgd,
    squared_loss,
    tokens,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline

options = paceline.options(model="vit")


class ViT(nn.Module):
    """Images [b, 3, 32, 32] -> scores of 10 classes."""

    def __init__(self, width: int, layers: int, heads: int, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class LSTM(nn.Module):
    """Tokens [b, t] -> scores of the next token [b, t, vocabulary]."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.first = nn.LSTM(width, width, batch_first=True)
        self.second = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.first(self.embedding(tokens))
        x, _ = self.second(x)
        return self.head(x)


class MixerLayer(nn.Module):
    """[b, patches, width] -> the same."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patch_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(
            nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches)
        )
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.patches(self.patch_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class Mixer(nn.Module):
    """Images [b, 3, 32, 32] -> scores of 10 classes."""

    def __init__(self, width: int, layers: int, patch: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, patch, stride=patch)
        self.layers = nn.ModuleList(MixerLayer((32 // patch) ** 2, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class TCN(nn.Module):
    """Tokens [b, t] -> scores of the next token [b, t, vocabulary]; no position sees a later one."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, dilation=2**n) for n in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        for number, layer in enumerate(self.layers):
            x = x + F.glu(layer(F.pad(x, (2 * 2**number, 0))), 1)
        return self.head(self.norm(x.transpose(1, 2)))


class Sets(nn.Module):
    """Points in no order [b, n, d] -> scores of 10 classes (Zaheer et al. 2017)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        each = [nn.Linear(i, width) for i in (inputs, width, width)]
        together = [nn.Linear(width, o) for o in (width, width, 10)]
        self.each, self.together = nn.ModuleList(each), nn.ModuleList(together)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.each:
            x = F.relu(layer(x))
        x = x.mean(1)
        for layer in self.together[:-1]:
            x = F.relu(layer(x))
        return self.together[-1](x)


class Tables(nn.Module):
    """Rows of categories [b, n] -> scores of 10 classes."""

    def __init__(self, columns: int, categories: int, width: int, layers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(categories, width) for _ in range(columns))
        wide = columns * width
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide))
            for _ in range(layers)
        )
        self.head = nn.Linear(wide, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = torch.cat([table(rows[:, n]) for n, table in enumerate(self.tables)], 1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Graph(nn.Module):
    """Points [b, n, d] -> scores of 10 classes; who is near whom is found once, and every layer needs it."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = torch.softmax(x @ x.transpose(1, 2), 2)
        x = self.enter(x)
        for layer in self.layers:
            x = x + F.gelu(layer(torch.cat([x, near @ x], 2)))
        return self.head(x.mean(1))


class Seq2Seq(nn.Module):
    """Two rows of tokens [b, 2, n], read and written -> scores of the second row's next tokens."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        about: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.source, self.target = (nn.Embedding(vocabulary, width) for _ in range(2))
        self.read = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **about) for _ in range(layers)
        )
        self.write = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, **about) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        memory = self.source(pairs[:, 0])
        for layer in self.read:
            memory = layer(memory)
        length = pairs.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=pairs.device).triu(1)
        x = self.target(pairs[:, 1])
        for layer in self.write:
            x = layer(x, memory, tgt_mask=later)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.past = nn.Conv2d(inputs, outputs, 1, stride=stride) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.past(x))


def resnet(width: int) -> nn.Module:
    """Images [b, 3, n, n] -> scores of 10 classes."""
    sizes = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(Residual(a, b) for a, b in itertools.pairwise(sizes)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class Towers(nn.Module):
    """Numbers of a user and of a thing [b, 2] -> how much the one likes the other [b]."""

    def __init__(self, rows: int, width: int, layers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(2))
        self.towers = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
                for _ in range(layers)
            )
            for _ in range(2)
        )

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        ends = []
        for number, (table, tower) in enumerate(zip(self.tables, self.towers, strict=True)):
            x = table(pairs[:, number])
            for layer in tower:
                x = x + layer(x)
            ends.append(x)
        return (ends[0] * ends[1]).sum(1)


def sentences(vocabulary: int, length: int, generator: torch.Generator) -> TensorDataset:
    drawn = torch.randint(vocabulary, (NUM_SAMPLES, 2, length + 1), generator=generator)
    return TensorDataset(drawn[:, :, :-1], drawn[:, 1, 1:])


def likings(rows: int, generator: torch.Generator) -> TensorDataset:
    pairs = torch.randint(rows, (NUM_SAMPLES, 2), generator=generator)
    return TensorDataset(pairs, torch.randn(NUM_SAMPLES, generator=generator))


def categories(columns: int, number: int, generator: torch.Generator) -> TensorDataset:
    rows = torch.randint(number, (NUM_SAMPLES, columns), generator=generator)
    return TensorDataset(rows, torch.randint(10, (NUM_SAMPLES,), generator=generator))


def autoencoder(width: int) -> nn.Module:
    """Images [b, 3, n, n] -> images of one channel."""
    sizes = [3, width, 2 * width, 4 * width, 4 * width]
    down = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())
        for a, b in itertools.pairwise(sizes)
    ]
    sizes = [1, *sizes[1:]][::-1]
    up = [
        nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1))
        for a, b in itertools.pairwise(sizes)
    ]
    return nn.Sequential(*down, *up)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for channels in (inputs, outputs):
        steps += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*steps)


class UNet(nn.Module):
    """Images [b, 3, n, n] -> images of one channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = _convolutions(3, width)
        self.down = nn.ModuleList([_convolutions(width, 2 * width), _convolutions(2 * width, 4 * width)])
        self.up = nn.ModuleList([_convolutions(6 * width, 2 * width), _convolutions(3 * width, width)])
        self.leave = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [self.enter(x)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return self.leave(x)


def brightness_loss(images: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(images, batch[0].mean(1, keepdim=True))


class InvertedBlock(nn.Module):
    """[b, inputs, h, w] -> [b, outputs, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.is_residual = inputs == outputs and stride == 1
        self.steps = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.steps(x) if self.is_residual else self.steps(x)


class Mobile(nn.Module):
    """Images [b, 3, n, n] -> scores of 10 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, stride=2, padding=1)
        sizes = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1), (4, 2), (4, 1), (4, 1))
        inputs = [1, *(size for size, _ in sizes)]
        self.blocks = nn.ModuleList(
            InvertedBlock(width * before, width * size, stride)
            for before, (size, stride) in zip(inputs, sizes, strict=False)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class DenseBlock(nn.Module):
    """Images [b, inputs, h, w] -> [b, inputs + layers × growth, h, w]: each layer sees what all before it have made."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, inputs + growth * number),
                nn.ReLU(),
                nn.Conv2d(inputs + growth * number, growth, 3, padding=1, bias=False),
            )
            for number in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Dense(nn.Module):
    """Images [b, 3, n, n] -> scores of 10 classes."""

    def __init__(self, width: int, growth: int, layers: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(DenseBlock(width, growth, layers))
            grown = width + growth * layers
            width = grown // 2
            self.between.append(nn.Sequential(nn.Conv2d(grown, width, 1), nn.AvgPool2d(2)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x))
        return self.head(x.mean((2, 3)))


class Pyramid(nn.Module):
    """Images [b, 3, n, n] -> scores of 10 classes, from four scales, of which each hears of the smaller ones."""

    def __init__(self, width: int, joined: int, scales: int) -> None:
        super().__init__()
        sizes = [3, *(width * 2**scale for scale in range(scales))]
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.ReLU(),
            )
            for before, after in itertools.pairwise(sizes)
        )
        self.across = nn.ModuleList(nn.Conv2d(size, joined, 1) for size in sizes[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(joined, joined, 3, padding=1) for _ in range(scales))
        self.head = nn.Linear(scales * joined, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for down in self.down:
            x = down(x)
            seen.append(x)
        told: list[torch.Tensor] = []
        above: torch.Tensor | None = None
        for found, across, smooth in zip(seen[::-1], self.across[::-1], self.smooth, strict=True):
            here = across(found)
            above = here if above is None else here + F.interpolate(above, scale_factor=2.0)
            told.append(smooth(above).mean((2, 3)))
        return self.head(torch.cat(told, 1))


def labelled_images(generator: torch.Generator) -> TensorDataset:
    return TensorDataset(
        torch.randn(256, 3, 64, 64, generator=generator), torch.randint(10, (256,), generator=generator)
    )


def large_images(generator: torch.Generator) -> TensorDataset:
    return TensorDataset(torch.randn(256, 3, 64, 64, generator=generator))


JOBS = {
    "vit": lambda: make(
        functools.partial(ViT, 192, 6, 6), functools.partial(labelled, (3, 32, 32), 10), class_loss, adamw, 16
    ),
    "lstm": lambda: make(
        functools.partial(LSTM, 512, 256), functools.partial(tokens, 512, 48), next_token_loss, adamw, 32
    ),
    "mixer": lambda: make(
        functools.partial(Mixer, 128, 8), functools.partial(labelled, (3, 32, 32), 10), class_loss, adamw, 32
    ),
    "autoencoder": lambda: make(
        functools.partial(autoencoder, 32),
        functools.partial(labelled, (3, 32, 32), 10),
        brightness_loss,
        sgd,
        32,
    ),
    "tcn": lambda: make(
        functools.partial(TCN, 512, 128, 6), functools.partial(tokens, 512, 64), next_token_loss, adamw, 32
    ),
    "sets": lambda: make(
        functools.partial(Sets, 16, 256), functools.partial(labelled, (48, 16), 10), class_loss, adamw, 64
    ),
    "tables": lambda: make(
        functools.partial(Tables, 8, 4096, 32, 4),
        functools.partial(categories, 8, 4096),
        class_loss,
        adamw,
        256,
    ),
    "graph": lambda: make(
        functools.partial(Graph, 16, 192, 6), functools.partial(labelled, (64, 16), 10), class_loss, sgd, 16
    ),
    "seq2seq": lambda: make(
        functools.partial(Seq2Seq, 512, 128, 3, 4),
        functools.partial(sentences, 512, 32),
        next_token_loss,
        adamw,
        16,
    ),
    "resnet": lambda: make(
        functools.partial(resnet, 24), functools.partial(labelled, (3, 32, 32), 10), class_loss, sgd, 32
    ),
    "towers": lambda: make(
        functools.partial(Towers, 8192, 64, 3), functools.partial(likings, 8192), squared_loss, adamw, 512
    ),
    "mobile": lambda: make(
        functools.partial(Mobile, 24), functools.partial(labelled, (3, 32, 32), 10), class_loss, sgd, 32
    ),
    "dense": lambda: make(
        functools.partial(Dense, 32, 16, 4, 3),
        functools.partial(labelled, (3, 32, 32), 10),
        class_loss,
        sgd,
        32,
    ),
    "pyramid": lambda: make(functools.partial(Pyramid, 24, 48, 4), labelled_images, class_loss, sgd, 16),
    "unet": lambda: make(functools.partial(UNet, 24), large_images, brightness_loss, sgd, 8),
}
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
