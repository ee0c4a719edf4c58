"""What processes hold, as the kernel counts it."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from preloaded import CONTEXT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.world import join
from paceline.measure import machine
from paceline.records import Layout
from paceline.train.held_memory import MOST_STEPS, Growth, load_splitting, measure_held_memory
from paceline.train.replica import Replica
from paceline.train.session import Datasets
from paceline.train.trial import LayoutTimer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB, PAGE = 1 << 20, os.sysconf("SC_PAGE_SIZE")
CPU = torch.device("cpu")


def test_growth_is_the_most_that_was_held():
    growth = Growth(CPU)
    tensor = torch.ones(64 * MIB, dtype=torch.uint8)
    del tensor
    grown = growth.most_bytes()
    if grown is None:
        pytest.skip("the peak cannot be set back here")
    assert 62 * MIB < grown < 72 * MIB
    # Another begins anew.
    after = Growth(CPU).most_bytes()
    assert after is not None
    assert after < 8 * MIB


def test_a_launcher_counts_where_the_same_limits_hold_for_it(monkeypatch):
    monkeypatch.setattr(os, "getppid", os.getpid)
    own = machine.launcher_memory_bytes()
    assert 0 < own < machine.held_memory_bytes("cpu")
    monkeypatch.setattr(os, "getppid", lambda: 0)  # of another namespace
    assert machine.launcher_memory_bytes() == 0


def test_a_process_holds_parameters_gradients_and_state():
    """Four layers of 4 MiB, and as much of gradients and of each of Adam's two moments."""
    job = paceline.Job(
        model=lambda: nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4))),
        data=lambda split: TensorDataset(*torch.randn(2, 64, 1024)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda params: torch.optim.Adam(params),
        batch_size=64,
        steps=10,
    )
    datasets = Datasets(job, 0)
    assert len(datasets["train"]) == len(datasets["test"])
    held = measure_held_memory(job, datasets, seed=0, device=CPU, precision="fp32")
    assert held.micro == 4
    assert list(held.recomputed) == ["selective", "full"]
    assert all(
        0 < s < 10
        for times in (held.step_s, *(one.step_s for one in held.recomputed.values()))
        for s in times
    )
    state = 4 * 16 * MIB
    for peak in (held.peak, held.peak_in_parts, *(one.peak for one in held.recomputed.values())):
        assert state - 2 * MIB < peak - held.empty < 2 * state
    assert 0 < held.files < held.empty


def test_what_splits_models_counts_where_a_model_is_split():
    job = paceline.Job(
        model=lambda: nn.Linear(8, 8),
        data=lambda split: TensorDataset(*torch.randn(2, 16, 8)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda params: torch.optim.SGD(params, 0.1),
        batch_size=16,
    )
    load_splitting(CPU)
    assert load_splitting(CPU) < 4 * MIB, "it was loaded already"
    about = {"seed": 0, "device": CPU, "precision": "fp32"}
    plain, more = (
        measure_held_memory(job, Datasets(job, 0), splitting=n * MIB, **about)  # type: ignore[arg-type]
        for n in (0, 50)
    )
    for name in ("peak", "peak_in_parts", "evaluation", "evaluation_in_parts", "empty"):
        assert 40 * MIB < getattr(plain, name) - getattr(more, name) < 60 * MIB
    assert more.splitting >= 50 * MIB
    assert abs(plain.recomputed["full"].peak - more.recomputed["full"].peak) < 10 * MIB


def large_evaluation() -> paceline.Job:
    """Steps on 8 rows of 8 KiB, and evaluations of 8192, which hold 64 MiB of rows and as much of outputs."""
    return paceline.Job(
        model=lambda: nn.Linear(2048, 2048),
        data=lambda split: TensorDataset(torch.zeros(8192, 1).expand(8192, 2048)),
        loss=lambda outputs, batch: outputs.mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        batch_size=8,
        evaluation_batch_size=8192,
        steps=10,
    )


def test_an_evaluation_that_holds_more_than_a_step_is_counted():
    job = large_evaluation()
    held = measure_held_memory(job, Datasets(job, 0), seed=0, device=CPU, precision="fp32")
    assert (held.evaluation_samples, held.fewer_samples) == (8192, 2048)
    assert held.evaluation - held.empty > 128 * MIB
    assert held.peak - held.empty < 80 * MIB
    assert 90 * MIB < held.evaluation - held.evaluation_in_parts < 270 * MIB


def in_a_new_process(function):
    """What it returns there: here malloc has memory that other tests have left, and hands that out first."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        found = pool.submit(function).result(timeout=120)
    if found is None:
        pytest.skip("the peak cannot be set back here")
    return found


def evaluate_twice() -> tuple[int, int] | None:
    """By how much memory grew in the second evaluation, at most and in the end."""
    job = large_evaluation()
    replica = Replica(job, seed=0, device=CPU, precision="fp32", total_steps=10)
    replica.evaluate(job.data("test"))
    before = machine.held_memory_bytes("cpu")
    if not machine.forget_peak_memory("cpu"):
        return None
    replica.evaluate(job.data("test"))
    return machine.peak_memory_bytes("cpu") - before, machine.held_memory_bytes("cpu") - before


def test_an_evaluation_leaves_nothing_behind():
    most, left = in_a_new_process(evaluate_twice)
    assert most > 120 * MIB
    assert left < 8 * MIB


def evaluate_in_parts() -> tuple[int, Any, Any] | None:
    """By how much memory grew; and what came out, at once and in parts."""
    job = large_evaluation()
    replica = Replica(job, seed=0, device=CPU, precision="fp32", total_steps=10)
    at_once = replica.evaluate(job.data("test"))
    replica.attach(data_mesh(Group.alone(CPU), Layout(micro=8)))
    before = machine.held_memory_bytes("cpu")
    if not machine.forget_peak_memory("cpu"):
        return None
    in_parts = replica.evaluate(job.data("test"))
    return machine.peak_memory_bytes("cpu") - before, at_once, in_parts


def test_micro_batches_bound_an_evaluation():
    most, at_once, in_parts = in_a_new_process(evaluate_in_parts)
    assert in_parts == (pytest.approx(at_once[0], rel=1e-4), at_once[1])
    assert most < 60 * MIB


def test_statistics_of_an_evaluations_batches_are_those_of_whole_batches():
    job = paceline.Job(
        model=lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        data=lambda split: TensorDataset(torch.arange(96.0).reshape(24, 4).sin()),
        loss=lambda outputs, batch: outputs.square().square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        batch_size=8,
        steps=1,
    )
    replica = Replica(job, seed=0, device=CPU, precision="fp32", total_steps=1)
    whole = replica.evaluate(job.data("test"))
    replica.attach(data_mesh(Group.alone(CPU), Layout(micro=4)))
    assert replica.evaluate(job.data("test")) == whole


class Growing(nn.Module):
    """Every forward pass holds some more from then on, as a heap with gaps does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.held = nn.Linear(4, 2), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Its first page and its last one may be there already.
        self.held.append(torch.ones(MIB + 2 * PAGE, dtype=torch.uint8))
        return self.linear(x)


def test_the_memory_of_a_trial_is_what_it_holds_after_some_steps():
    data = TensorDataset(torch.zeros(64, 4), torch.zeros(64, dtype=torch.int64))
    job = paceline.Job(
        model=Growing,
        data=lambda split: data,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=64,
    )
    world = join("cpu", 60.0)
    timer = LayoutTimer(
        job,
        [Layout(threads=1)],
        world,
        Datasets(job, 0),
        seed=0,
        precision="fp32",
        budget_s=0.2,
        rounds=(3, 3),
        evaluates=True,
    )
    (trial,) = timer.run()
    if trial.grown_bytes is None:
        pytest.skip("the peak cannot be set back here")
    assert MOST_STEPS * MIB <= trial.grown_bytes < (MOST_STEPS + 12) * MIB
