"""The models of peer_jobs.py and gpu_jobs.py: a GPT, a network of convolutions, a perceptron."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F


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
