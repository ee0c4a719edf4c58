"""What processes hold, as the kernel counts it."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.measure import machine
from paceline.train.held_memory import Growth, measure_held_memory
from paceline.train.session import Datasets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20
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
    assert held.peak_recomputed is not None
    state = 4 * 16 * MIB
    for peak in (held.peak, held.peak_in_parts, held.peak_recomputed):
        assert state - 2 * MIB < peak - held.empty < 2 * state
    assert 0 < held.files < held.empty
