"""Evaluations of a pipeline: the first stages do not run ahead of the last, whatever carries their messages."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from groups import run_group
from torch import nn
from torch.utils.data import TensorDataset

import paceline
from paceline.comm.world import World
from paceline.measure.machine import forget_peak_memory, held_memory_bytes, peak_memory_bytes
from paceline.train.session import Session

MIB = 1 << 20
MICRO_BATCHES, SLOW_S = 64, 0.01


def slow_job() -> paceline.Job:
    """Each micro-batch of an evaluation sends 1 MiB from stage to stage, and the last one takes its time."""

    def loss(outputs, batch):
        if not torch.is_grad_enabled():
            time.sleep(SLOW_S)
        return outputs.mean()

    return paceline.Job(
        model=lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))),
        data=lambda split: TensorDataset(torch.ones(1, 256, 64).expand(16 * MICRO_BATCHES, 256, 64)),
        loss=loss,
        metrics={"mean": lambda outputs, batch: outputs.mean()},
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        batch_size=8,
        evaluation_batch_size=32,
        steps=1,
    )


def evaluate(world: World, layout: str) -> tuple[list[float], int]:
    """Metrics, the second time, and by how much the memory of this worker has grown at most since it has stepped."""
    session = Session(slow_job(), layout, world=world)
    session.step(next(iter(session.batches())))
    before = held_memory_bytes("cpu")
    forget_peak_memory("cpu")
    metrics = [session.evaluate() for _ in range(2)][1]
    return list(metrics.values()), peak_memory_bytes("cpu") - before


@pytest.fixture(scope="module")
def alone() -> list[float]:
    metrics, _ = run_group(evaluate, 1, "dp_replicate=1")[0]
    return metrics  # type: ignore[no-any-return]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("layout", ["pp=2,micro=2", "pp=2,micro=2,schedule=zbv"])
def test_what_is_sent_does_not_pile_up(transport, layout, alone):
    for metrics, grown in run_group(evaluate, 2, layout, transport=transport).values():
        assert metrics == pytest.approx(alone, rel=1e-4)
        assert grown < MICRO_BATCHES * MIB / 2
