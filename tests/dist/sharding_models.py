"""Small models, each with one thing that sharding may get wrong; and their training by plain PyTorch.

A batch is cut into shares of two samples: `share(step, number)`. Plain PyTorch takes them one after the other, `n`
workers take `n` at a time; the loss is the sum over shares, and both must come to the same gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

WIDTH = 5
NUM_STEPS = 3
NUM_MICRO = 2
MAX_WORKERS = 4


class Block(nn.Module):
    """Sizes are odd, so that no flat tensor divides evenly and parameters lie across two workers' ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Chain(nn.Module):
    """Blocks between two linear layers; the others below change what is between."""

    make_block: Callable[[], nn.Module] = Block
    num_blocks = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(type(self).make_block() for _ in range(self.num_blocks))
        self.last = nn.Linear(WIDTH, 3)

    def apart(self) -> list[nn.Parameter]:
        """Parameters of blocks that are read outside of them."""
        return []

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


class Tied(Chain):
    """Two blocks share a matrix, and so do the two ends of the model, into which tokens come."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(11, WIDTH)
        self.last = nn.Linear(WIDTH, 11, bias=False)
        self.last.weight = self.first.weight
        self.blocks[1].up.weight = self.blocks[0].up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x[:, 0].abs() * 4).long())


class Experts(nn.Module):
    """One of two experts; nobody takes the third. The offset goes with the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.offset = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if takes_first_expert():
            return x + self.experts[0](torch.tanh(x))
        return x + self.experts[1](torch.sin(x)) * self.offset


class ExpertChain(Chain):
    make_block = Experts


class ConstantExpert(nn.Module):
    """For some shares the output does not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.constant = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) if takes_first_expert() else torch.tanh(self.constant).expand_as(x)


class ConstantChain(Chain):
    """The way around the blocks is outside of them: earlier blocks have a gradient whatever a block does."""

    make_block = ConstantExpert

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Frozen(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.blocks[2].up.weight.requires_grad_(False)
        self.first.requires_grad_(False)


class Twice(Chain):
    """One block follows itself, another comes again after others."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        return first(third(second(second(first(x)))))


class ReadOutside(Chain):
    def apart(self) -> list[nn.Parameter]:
        return [self.blocks[0].down.bias]

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return super().between(x) * self.blocks[0].down.bias


class Branches(Chain):
    """Blocks beside each other, and one whose result is not used."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        third(x)
        return torch.sin(first(x)) * second(x) + first(x)


class Checkpointed(Chain):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointedWhole(Chain):
    """Without the early stop the block runs to its end a second time."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        with set_checkpoint_early_stop(False):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointedReentrant(Chain):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x


class CheckpointedTogether(Chain):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        x = checkpoint(lambda y: torch.tanh(second(first(y))), x, use_reentrant=False)
        return third(x)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    memory: torch.Tensor
    unused: torch.Tensor


class Structured(Block):
    """Takes and returns structures, changes its input in place, and passes on the memory that the first one made."""

    def forward(self, x: torch.Tensor, *, memory: torch.Tensor | None) -> Output:
        hidden = super().forward(x.mul_(1.5))
        if memory is None:
            memory = torch.sin(self.up(torch.tanh(self.down(torch.sin(self.up(hidden))))))[:, :WIDTH]
        return Output(hidden + memory, memory, self.up(hidden))


class StructuredChain(Chain):
    make_block = Structured

    def between(self, x: torch.Tensor) -> torch.Tensor:
        memory = None
        for block in self.blocks:
            output = block(x * 1.0, memory=memory)
            x, memory = output.hidden, output.memory
        return x * memory


class Leading(nn.Module):
    """A block that takes tokens: nothing that comes in has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.scale = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scale(torch.tanh(self.embedding(tokens)))


class LeadingChain(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = Leading()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between((x[:, 0].abs() * 4).long()))


MODELS: dict[str, type[Chain]] = {
    "chain": Chain,
    "tied": Tied,
    "experts": ExpertChain,
    "constant_expert": ConstantChain,
    "frozen": Frozen,
    "twice": Twice,
    "read_outside": ReadOutside,
    "branches": Branches,
    "checkpoint": Checkpointed,
    "checkpoint_whole": CheckpointedWhole,
    "checkpoint_reentrant": CheckpointedReentrant,
    "checkpoint_together": CheckpointedTogether,
    "structured": StructuredChain,
    "leading": LeadingChain,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Chain:
    torch.manual_seed(3)
    return MODELS[name]().to(dtype)


def share(step: int, number: int) -> torch.Tensor:
    """Two samples."""
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(100 * step + number))


def takes_first_expert() -> bool:
    """As if a router had chosen: by the share under way, so that workers differ."""
    return bool(_CHOICE[0])


_CHOICE = [0]


def loss_of(model: nn.Module, step: int, number: int) -> torch.Tensor:
    """The part of one share in the step's loss."""
    _CHOICE[0] = number % 2
    dtype = next(model.parameters()).dtype
    return model(share(step, number).to(dtype)).square().sum() / (2 * NUM_MICRO * MAX_WORKERS)


def make_optimizer(kind: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 0.003},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def train_plainly(name: str, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """One process: `gradient.STEP.NAME`, missing where there is none, and `parameter.NAME`."""
    model = build(name, dtype)
    optimizer = make_optimizer(kind, [p for p in model.parameters() if p.requires_grad])
    result = {}
    for step in range(NUM_STEPS):
        for number in range(NUM_MICRO * MAX_WORKERS):
            loss_of(model, step, number).backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                result[f"gradient.{step}.{key}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return result | {f"parameter.{key}": p.detach().clone() for key, p in model.named_parameters()}
