"""Whether a job is measured with its whole model is known before any worker builds it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TOY

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.errors import JobError
from paceline.launch import agreeing, preflight
from paceline.launch.agreeing import agree_on_precision
from paceline.launch.spec import RunSpec
from paceline.load import load_job_file
from paceline.records import Cluster, Host
from paceline.train import room, whole_model
from paceline.train.session import Datasets
from paceline.train.whole_model import MOST_SHARE, why_block_by_block

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from gpt_job import gpt

CPU = torch.device("cpu")
MIB = 1 << 20
CLUSTER = Cluster(
    hosts=(Host(name="a", device="cpu", device_name="", cores=1, memory_bytes=1 << 30, workers=1),)
)


def why(monkeypatch: pytest.MonkeyPatch, memory_bytes: int, batch_size: int = 8, local_size: int = 1) -> str:
    """On a host of so much memory, of which nothing else takes anything."""
    job = gpt(512, batch_size=batch_size)
    host = dataclasses.make_dataclass("Host", ["memory_bytes"])(memory_bytes)
    monkeypatch.setattr(whole_model, "describe_host", lambda kind, workers: host)
    monkeypatch.setattr(whole_model, "available_memory_bytes", lambda kind: memory_bytes)
    monkeypatch.setattr(whole_model, "held_memory_bytes", lambda kind: 0)
    monkeypatch.setattr(whole_model, "launcher_memory_bytes", lambda: 0)
    monkeypatch.setattr(room, "available_memory_bytes", lambda kind: memory_bytes)
    world = World(0, 1, 0, local_size, CPU, 10.0)
    return why_block_by_block(job, Datasets(job, 0), world, Group.alone(CPU), seed=0, precision="fp32")


def state_bytes() -> int:
    """Parameters, gradients and AdamW's moments."""
    return 16 * sum(p.numel() for p in gpt(512).model().parameters())


def test_what_is_trained_must_fit_with_a_quarter_left_free(monkeypatch):
    needed = state_bytes() / MOST_SHARE
    told = why(monkeypatch, int(needed * 0.98))
    assert f"takes about {state_bytes() / MIB:,.0f} MiB" in told
    assert "of which 25% are left free" in told
    assert why(monkeypatch, int(needed * 1.3)) == ""


def test_activations_count(monkeypatch):
    enough = int(state_bytes() / MOST_SHARE * 1.3)
    assert why(monkeypatch, enough, batch_size=8) == ""
    assert why(monkeypatch, enough, batch_size=64) != ""


def test_all_workers_of_a_host_measure_at_once(monkeypatch):
    enough = int(state_bytes() / MOST_SHARE * 1.3)
    assert why(monkeypatch, 2 * enough, local_size=2) == ""
    told = why(monkeypatch, enough, local_size=2)
    assert f"each worker has {enough / 2 / MIB:,.0f} MiB" in told


def test_nothing_is_tried_out_on_a_model_that_has_no_room(monkeypatch, tmp_path):
    """Neither the launcher's step nor the steps in bfloat16."""

    def fail(*_: Any, **__: Any) -> None:
        raise JobError("it was built")

    spec = RunSpec(job_file=str(TOY), out=str(tmp_path))
    loaded = load_job_file(str(TOY), {})
    datasets = Datasets(loaded.job, 0)
    world = World(0, 1, 0, 1, CPU, 10.0)
    monkeypatch.setattr(preflight, "_try_step", fail)
    monkeypatch.setattr(agreeing, "choose_precision", fail)
    with pytest.raises(JobError, match="it was built"):
        preflight.preflight(spec, "cpu", 1)
    with pytest.raises(JobError, match="it was built"):
        agree_on_precision(spec, loaded, datasets, world, Group.alone(CPU), CLUSTER)
    monkeypatch.setattr(room, "available_memory_bytes", lambda kind: 1024)
    preflight.preflight(spec, "cpu", 1)
    precision, reason = agree_on_precision(spec, loaded, datasets, world, Group.alone(CPU), CLUSTER)
    assert precision == "fp32"
    assert reason.startswith("what one process would gain was not timed: it takes about")
    asked = spec.model_copy(update={"layout": "dp_replicate=1"})
    with pytest.raises(JobError, match="it was built"):
        preflight.preflight(asked, "cpu", 1)
