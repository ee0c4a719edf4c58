"""Small jobs, one for each thing that goes wrong when a model is split; beside those of `jobs.py`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from jobs import JOBS, Images, Points, Recorder, Sentences, cross_entropy, data_of, padded_loss, plain
from torch import nn
from torch.nn import functional as F

import paceline


class Attention(nn.Module):
    """Queries, keys and values in one weight; fewer heads of keys and values than of queries."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size)
        self.head_norm = nn.LayerNorm(self.size)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = (y.view(b, t, -1, self.size).transpose(1, 2) for y in self.qkv(x).split(widths, -1))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(self.head_norm(q), k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads=4, kv_heads=2)
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 32), nn.Linear(width, 32)
        self.down = nn.Linear(32, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        h = self.norm(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))


class Swish(torch.autograd.Function):
    """As in a compiled kernel of the user's own, what it calls is not seen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        with torch._C.DisableTorchFunction():
            return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            s = torch.sigmoid(x)
            return gradient * (s + x * s * (1 - s))


class OwnFunction(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.down(Swish.apply(self.up(x)))


class Transformer(nn.Module):
    """Tied embeddings, a parameter that the model adds between its blocks, and masks made from the batch."""

    def __init__(self, blocks: int = 4, width: int = 16, *, own_function: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width, padding_idx=0)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        if own_function:
            self.blocks[1] = OwnFunction(width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mask = causal & ((x != 0)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device))
        h = self.embedding(x)
        h += self.place[: x.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return F.linear(self.norm(h) * self.scale, self.embedding.weight)


class UNet(nn.Module):
    """What the way down finds is used again on the way up; some of it is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Tanh())
        self.up = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
        self.head = nn.Linear(8 * 2 * 2, 4)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x) * 1.0
        a += self.shift
        b = F.interpolate(self.down2(F.max_pool2d(a, 2)), scale_factor=2.0)
        return self.head(self.up(torch.cat([a, b], 1)).flatten(1))


class Shared(nn.Module):
    """One block, called four times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(12, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(4):
            h = h + self.block(h)
        return self.last(h)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, 32), nn.Unflatten(1, (2, 16)), encoder, nn.Flatten(), nn.Linear(32, 4))


def deep() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(nn.Linear(12, 16), *layers, nn.Linear(16, 4))


class Grouped(Recorder):
    """No weight decay for vectors, as is usual: groups by shape, and one by place."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        first, rest = params[:1], params[1:]
        self.param_groups[0]["params"] = [p for p in rest if p.ndim > 1]
        self.add_param_group({"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0})
        self.add_param_group({"params": first, "lr": 0.01})


sentences = dataclasses.replace(
    plain, model=Transformer, data=data_of(Sentences), loss=padded_loss, metrics={}, clip_norm=0.5
)

SPLIT_JOBS: dict[str, tuple[paceline.Job, int]] = {
    "transformer": (sentences, 1),
    "own_function": (dataclasses.replace(sentences, model=functools.partial(Transformer, own_function=True)), 1),
    "unet": (dataclasses.replace(plain, model=UNet, data=data_of(Images)), 1),
    "shared": (dataclasses.replace(plain, model=Shared), 1),
    "torch_encoder": (dataclasses.replace(plain, model=torch_encoder), 1),
    "deep": (dataclasses.replace(plain, model=deep, optimizer=Grouped, data=data_of(Points)), 1),
    **{
        name: JOBS[name]
        for name in (
            "weighted", "batch_norm", "clipped_weighted", "tied", "unused", "frozen", "iterable", "one_sample_last",
            "dropout", "schedule",
        )
    },
}  # fmt: skip
"""name -> (job, micro)"""

__all__ = ["SPLIT_JOBS", "cross_entropy"]
