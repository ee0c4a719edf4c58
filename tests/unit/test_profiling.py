"""What is measured of a job for the planner: everything counted once, and the blocks add up to the whole."""

from __future__ import annotations

import gc

import pytest
import torch
from command import TOY
from torch import nn
from torch.utils.data import TensorDataset

import paceline
from paceline.train.block_costs import BlockCosts
from paceline.train.passes import FEWEST, LEAST_S, MOST, Timing, wants_more
from paceline.train.profiling import Curves, Measured, measure_costs
from paceline.train.session import Datasets

WIDTH, SAMPLES = 16, 64


class Layered(nn.Module):
    """Three blocks between a table and a head, one parameter read beside them, and one block that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x) * self.scale
        return self.head(self.frozen(x))


def data(split: str) -> TensorDataset:
    tokens = torch.randint(10, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens)


def job() -> paceline.Job:
    return paceline.Job(
        model=Layered,
        data=data,
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
        batch_size=16,
    )


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure_costs(
        job(),
        Datasets(job(), 1),
        seed=1,
        device=torch.device("cpu"),
        sizes=[4, 16],
        threads=1,
        budget_s=0.3,
    )


def test_blocks_are_found_once_and_stand_in_the_models_order(measured):
    costs = measured.costs
    names = [costs.blocks[at].name for at in costs.row]
    assert names == ["table", *["blocks.0"] * 3, "frozen", "head", "loss"]
    assert len(costs.blocks) == 5


def test_every_parameter_is_counted_once(measured):
    model = Layered()
    row = measured.costs.model
    assert sum(block.parameter_bytes for block in row) == sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(block.trained_bytes for block in row) == trained
    frozen = next(block for block in row if block.name == "frozen")
    assert frozen.trained_bytes == 0
    # AdamW's two moments, and a count of steps for each parameter.
    assert 2.0 <= measured.state_per_byte < 2.1


def test_bytes_are_those_of_the_tensors(measured):
    block = next(block for block in measured.costs.model if block.name == "blocks.0")
    assert block.output_bytes == WIDTH * 4
    assert block.saved_full_bytes == WIDTH * 4
    # Of a linear layer its inputs, of the hyperbolic tangent its outputs.
    assert WIDTH * 4 <= block.saved_bytes <= 3 * WIDTH * 4


def test_costs_grow_with_the_samples_and_are_all_there(measured):
    costs = measured.costs
    for block in costs.blocks:
        assert [size for size, _ in block.forward_s.points] == [4.0, 16.0]
        assert block.forward_s(16) > 0
    passes_s = sum(block.forward_s(16) + block.backward_s(16) for block in costs.model)
    # With what every step costs they make up the step that was timed as a whole.
    whole_s = (
        passes_s
        + costs.fixed_s
        + costs.data_s(16)
        + costs.optimizer_s_per_byte * sum(block.trained_bytes for block in costs.model)
    )
    assert whole_s >= measured.step_s * 0.999
    assert costs.add_s_per_byte > 0


class Uneven(nn.Module):
    """A block without weights, one that has nothing else, one of which both halves are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256)
        self.bare = nn.Sequential(*(nn.Tanh() for _ in range(30)))
        self.wide = nn.Linear(256, 2048)
        self.head = nn.Linear(2048, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.bare(self.first(x))))


def test_what_gradients_of_weights_take_is_told_apart():
    inputs = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    uneven = paceline.Job(
        model=Uneven,
        data=lambda split: TensorDataset(inputs, inputs[:, :4].argmax(1)),
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=256,
    )
    datasets = Datasets(uneven, 0)
    costs = measure_costs(
        uneven, datasets, seed=0, device=torch.device("cpu"), sizes=[256], threads=1, budget_s=1.0
    ).costs
    share = {block.name: block.weights_share for block in costs.blocks}
    # Nobody needs gradients of what comes in; and functions without weights have none of weights.
    assert share["first"] > 0.8
    assert share["bare"] < 0.3
    assert 0.2 < share["wide"] < 0.8


def test_a_model_that_nothing_can_be_told_apart_of_is_taken_in_halves():
    inputs = torch.arange(32).view(8, 4)
    tokens = paceline.Job(
        model=lambda: nn.Embedding(32, 4),
        data=lambda split: TensorDataset(inputs),
        loss=lambda outputs, batch: outputs.pow(2).mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=8,
    )
    costs = measure_costs(
        tokens, Datasets(tokens, 0), seed=0, device=torch.device("cpu"), sizes=[8], threads=1, budget_s=0.1
    ).costs
    assert all(0 <= block.weights_share <= 1 for block in costs.blocks)


class Picky(nn.Module):
    """Does not run where its weights have no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not self.second.weight.requires_grad:
            raise RuntimeError("frozen")
        return self.second(self.first(x))


def test_a_model_that_does_not_run_with_frozen_weights_is_measured_all_the_same():
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    picky = paceline.Job(
        model=Picky,
        data=lambda split: TensorDataset(inputs),
        loss=lambda outputs, batch: outputs.pow(2).mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=8,
    )
    costs = measure_costs(
        picky, Datasets(picky, 0), seed=0, device=torch.device("cpu"), sizes=[8], threads=1, budget_s=0.1
    ).costs
    assert {block.weights_share for block in costs.blocks} == {0.5}


def test_a_job_from_a_file_is_measured_at_its_batch_size():
    toy = paceline.load_job(TOY)
    found = measure_costs(
        toy, Datasets(toy, 1), seed=1, device=torch.device("cpu"), sizes=[12], threads=1, budget_s=0.1
    )
    assert found.costs.model[-1].name == "loss"


def test_what_pauses_take_is_in_the_blocks():
    """Two calls of 1 ms and 2 ms, forward and backward; a pause of 12 ms comes in two of four passes."""
    forward_s = [[1e-3, 2e-3], [13e-3, 2e-3], [1e-3, 2e-3], [1e-3, 14e-3]]
    backward_s = [[1e-3, 2e-3]] * 4
    whole_s = [sum(f) + sum(b) for f, b in zip(forward_s, backward_s, strict=True)]
    timing = Timing(forward_s, backward_s, whole_s)
    curves = Curves({8: timing}, 1.0, pauses=True)
    # Together the mean of 6, 18, 6 and 18 ms, shared out as the medians are.
    assert [curves.forward([n])(8) for n in (0, 1)] == pytest.approx([2e-3, 4e-3])
    assert curves.backward([0, 1])(8) == pytest.approx(3e-3)
    half = Curves({8: timing}, 0.5, pauses=True)
    assert half.forward([1])(8) == pytest.approx(2e-3)


def test_short_measurements_go_on_for_some_periods_of_a_scheduler():
    assert wants_more(FEWEST - 1, 100.0, 1.0)
    assert wants_more(MOST - 1, 0.9, 1.0)
    assert not wants_more(FEWEST, 1.1, 1.0)
    assert wants_more(10 * MOST, LEAST_S / 2, 1.0)
    assert not wants_more(MOST, LEAST_S, 1.0)
    assert not wants_more(MOST, LEAST_S / 2, LEAST_S / 4)


def tensors_with_a_graph() -> int:
    """Results of operations that torch keeps for a backward pass, wherever they are held."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum(tensor.grad_fn is not None for tensor in found)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_measuring_leaves_nothing_behind(in_blocks):
    """Operations that save their own results, as tanh does, are freed again when what is saved is counted."""
    before = tensors_with_a_graph()
    about = {"seed": 1, "device": torch.device("cpu"), "sizes": [4, 16]}
    if in_blocks:
        BlockCosts(job(), Datasets(job(), 1), **about).measure(threads=1, budget_s=0.1)
    else:
        measure_costs(job(), Datasets(job(), 1), threads=1, budget_s=0.1, **about)
    assert tensors_with_a_graph() <= before
