"""A transformer of 110 M parameters on random tokens: large enough that its state is what fills the memory.

A worker that finds PACELINE_CGROUP in its environment first enters the memory cgroup of that name and its rank.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import paceline

options = paceline.options(width=768, layers=12, heads=12, vocabulary=16384, context=64, batch_size=8)

if "PACELINE_CGROUP" in os.environ and "RANK" in os.environ:
    name = f"{os.environ['PACELINE_CGROUP']}-{os.environ['RANK']}"
    Path(f"/sys/fs/cgroup/memory/{name}/tasks").write_text(str(os.getpid()))


class Tokens(Dataset):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(options.vocabulary, (options.context + 1,), generator=generator)
        return tokens[:-1], tokens[1:]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = options.width
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        b, t, d = x_btd.shape
        q, k, v = self.qkv(self.attention_norm(x_btd)).view(b, t, 3, options.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_btd = x_btd + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x_btd + self.down(F.gelu(self.up(self.mlp_norm(x_btd))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(options.vocabulary, options.width)
        self.places = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block() for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


job = paceline.Job(
    model=GPT,
    data=lambda split: Tokens() if split == "train" else torch.utils.data.Subset(Tokens(), range(8)),
    loss=lambda scores, batch: F.cross_entropy(scores.flatten(0, 1), batch[1].flatten()),
    optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4),
    batch_size=options.batch_size,
    steps=3,
)
