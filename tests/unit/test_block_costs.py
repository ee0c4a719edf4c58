"""A model that is measured block by block: what is found is what the whole model shows, and no more is held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.errors import JobError
from paceline.measure.machine import forget_peak_memory, held_memory_bytes, peak_memory_bytes
from paceline.train.allocator import give_back_freed_memory
from paceline.train.block_costs import BlockCosts, state_per_byte
from paceline.train.profiling import Measured, measure_costs
from paceline.train.replica import Replica
from paceline.train.session import Datasets

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from gpt_job import gpt

CPU = torch.device("cpu")
WIDTH = 64
MIB = 1 << 20


def in_blocks(job: paceline.Job, sizes: list[int]) -> Measured:
    costs = BlockCosts(job, Datasets(job, 1), seed=1, device=CPU, sizes=sizes)
    return costs.measure(threads=1, budget_s=0.2)


@pytest.fixture(scope="module")
def both() -> tuple[Measured, Measured]:
    job = gpt(WIDTH)
    whole = measure_costs(job, Datasets(job, 1), seed=1, device=CPU, sizes=[2, 8], threads=1, budget_s=0.2)
    return whole, in_blocks(job, [2, 8])


def test_blocks_alone_are_those_of_the_whole_model(both):
    whole, alone = both
    assert alone.costs.row == whole.costs.row == (0, 1, 1, 1, 2, 3, 4)
    assert alone.costs.crossing_bytes == whole.costs.crossing_bytes
    assert all(whole.costs.crossing_bytes[:4])
    for one, other in zip(alone.costs.blocks, whole.costs.blocks, strict=True):
        assert one.name == other.name
        for what in ("parameter_bytes", "trained_bytes", "saved_bytes", "saved_full_bytes", "output_bytes"):
            assert getattr(one, what) == getattr(other, what), (one.name, what)
        assert one.flops == other.flops
        # The positions get their values when they are first read: a few calls.
        assert abs(one.operations - other.operations) <= 3
    assert alone.state_per_byte == pytest.approx(whole.state_per_byte, rel=1e-3)
    assert state_per_byte(
        Replica(gpt(WIDTH), seed=1, device=CPU, precision="fp32", total_steps=1)
    ) == pytest.approx(2, abs=0.001)


def test_in_bfloat16_too():
    """What is saved is in another type, weights that were cast included."""
    job = gpt(WIDTH)
    about = {"seed": 1, "device": CPU, "sizes": [4], "precision": "bf16"}
    whole = measure_costs(job, Datasets(job, 1), threads=1, budget_s=0.1, **about)
    alone = BlockCosts(job, Datasets(job, 1), **about).measure(threads=1, budget_s=0.1)
    for one, other in zip(alone.costs.blocks, whole.costs.blocks, strict=True):
        assert one.saved_bytes == other.saved_bytes, one.name
        assert one.output_bytes == other.output_bytes, one.name


def test_everything_that_takes_time_is_there(both):
    costs = both[1].costs
    for block in costs.blocks:
        assert [size for size, _ in block.forward_s.points] == [2.0, 8.0]
        assert block.forward_s(8) > 0
    head = next(block for block in costs.blocks if block.name == "head")
    assert head.backward_s(8) > 0
    passes_s = sum(block.forward_s(8) + block.backward_s(8) for block in costs.model)
    trained = sum(block.trained_bytes for block in costs.model)
    step_s = passes_s + costs.data_s(8) + costs.optimizer_s_per_byte * trained
    # A curve that never falls may be above what was measured.
    assert 0.5 * step_s < both[1].step_s < step_s * (1 + 1e-6)
    assert costs.optimizer_s_per_byte > 0
    assert costs.add_s_per_byte > 0


class Stack(nn.Module):
    """Ten blocks of 4 MiB, of which each saves its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stack() -> paceline.Job:
    return paceline.Job(
        model=Stack,
        data=lambda split: TensorDataset(*torch.randn(2, 64, 1024)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
        batch_size=64,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_one_block_is_held():
    """The whole takes 160 MiB; a block 16, its measurement two matrices of addition_s, 64; the cache of values 64."""
    job = stack()
    datasets = Datasets(job, 1)
    _ = datasets["train"]
    in_blocks(job, [64])  # what torch takes once
    give_back_freed_memory()
    before = held_memory_bytes("cpu")
    if not forget_peak_memory("cpu"):
        pytest.skip("the peak cannot be set back here")
    costs = BlockCosts(job, datasets, seed=1, device=CPU, sizes=[64])
    measured = costs.measure(threads=1, budget_s=0.1)
    assert peak_memory_bytes("cpu") - before < 120 * MIB
    block = measured.costs.blocks[0]
    assert measured.costs.row == (0, *[1] * 9, 2), "the first block's inputs need no gradient"
    assert block.parameter_bytes == 4 * MIB
    # Its result and the gradient of its inputs, 4 KiB each.
    assert 0 < block.peak_bytes < 64 << 10
    model = costs._replica.model
    assert costs._walk.between == [], "they would all be filled at once"
    assert all(not p.untyped_storage().nbytes() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not costs._replica.optimizer.state


class Chooser(nn.Module):
    """It calls its second layer for large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if len(x) > 4 else x


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Chooser, "calls 2 of its blocks for one batch, and 1 for another"),
        (Bare, "calls none of its modules"),
    ],
)
def test_models_without_blocks_that_can_be_told_apart_are_refused(model, words):
    job = paceline.Job(
        model=model,
        data=lambda split: TensorDataset(*torch.randn(2, 16, WIDTH)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=8,
    )
    with pytest.raises(JobError, match=words):
        in_blocks(job, [2, 8])


class Awkward(nn.Module):
    """Results that look into a parameter, arguments handed through, in-place code around, dropout, a tied argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Positions()
        self.blocks = nn.ModuleList(Adding() for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: dict[str, list[torch.Tensor]] = {"seen": []}
        x = x + self.table(len(x))
        for block in self.blocks:
            x, _ = block(x, x.detach(), state, weight=self.frozen.weight)
            x *= 0.5
        return self.frozen(self.norm(x))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, number: int) -> torch.Tensor:
        return self.weight[:number]


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask, state, weight):
        state["seen"].append(x.detach())
        x.add_(1.0)
        return self.drop(self.inner(x)) + x @ weight.t(), mask


def test_awkward_models_are_measured_too():
    job = paceline.Job(
        model=Awkward,
        data=lambda split: TensorDataset(*torch.randn(2, 16, WIDTH)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        batch_size=16,
    )
    found = in_blocks(job, [8, 16])
    whole = measure_costs(job, Datasets(job, 1), seed=1, device=CPU, sizes=[8, 16], threads=1, budget_s=0.1)
    assert sum(b.parameter_bytes for b in found.costs.model) == sum(
        b.parameter_bytes for b in whole.costs.model
    )
    assert found.state_per_byte == pytest.approx(whole.state_per_byte)
    assert [b.name for b in found.costs.model] == [b.name for b in whole.costs.model]
