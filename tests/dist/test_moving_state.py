"""A training moves from layout to layout: nothing of its state changes, and it goes on as if it had been one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_jobs import MOVING_JOBS, STEPS
from torch.utils.data import IterableDataset, default_collate

from paceline.train.order import epoch_order
from paceline.train.seeds import derive, seed_everything

WAYS = {
    "adamw": [
        ["dp_replicate=2", "dp_replicate=1", "dp_shard=2,zero=3", "pp=2", "dp_replicate=4"],
        ["dp_shard=2,zero=1", "tp=2", "dp_replicate=3", "pp=2,dp_shard=2,zero=2", "tp=2,dp_replicate=2"],
    ],
    "momentum": [["dp_replicate=2", "dp_shard=4,zero=2", "dp_replicate=1", "pp=2,tp=2"]],
    "adafactor": [["dp_replicate=2", "pp=2", "dp_replicate=1", "dp_replicate=4"]],
}
CASES = [(name, " ".join(texts)) for name, ways in WAYS.items() for texts in ways]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All of them in one launch of four workers."""
    directory = tmp_path_factory.mktemp("moving")
    asked = directory / "asked.json"
    asked.write_text(json.dumps([[name, texts] for name, ways in WAYS.items() for texts in ways]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    process = subprocess.run(
        [*command, str(Path(__file__).parent / "moving_worker.py"), str(asked), str(directory / "moved.pt")],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results: dict[str, dict[str, Any]] = torch.load(directory / "moved.pt", weights_only=False)
    return results


def train_plainly(name: str, steps: int) -> dict[str, Any]:
    """The same training by a plain loop in one process; its losses and weights."""
    job = MOVING_JOBS[name]
    seed_everything(derive(7, "model"))
    model = job.model()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = job.schedule(optimizer, steps) if job.schedule else None
    data, losses, epoch = job.data("train"), [], 0
    while len(losses) < steps:
        map_style = not isinstance(data, IterableDataset)
        samples = [data[int(i)] for i in epoch_order(7, epoch, len(data))] if map_style else list(data)
        for begin in range(0, len(samples), job.batch_size):
            if len(losses) == steps:
                break
            batch = default_collate(samples[begin : begin + job.batch_size])
            loss = job.loss(model(batch[0]), batch)
            loss.backward()
            if job.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        epoch += 1
    return {"losses": torch.tensor(losses), "weights": model.state_dict()}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_move_changes_no_bit_of_the_state(name, way, moved):
    moves = moved[f"{name}/{way}"]["moves"]
    assert len(moves) == len(way.split()) - 1
    for before, after in moves:
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[key].dtype, key
                assert torch.equal(value, after[key]), key
            else:
                assert value == after[key], key


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_training_goes_on_as_in_one_process(name, way, moved):
    found = moved[f"{name}/{way}"]
    wanted = train_plainly(name, STEPS * len(way.split()))
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-4, atol=1e-5)
    state = found["end"]
    assert state["steps"] == STEPS * len(way.split())
    for key, value in wanted["weights"].items():
        kind = "parameter" if f"parameter.{key}" in state else "buffer"
        torch.testing.assert_close(
            state[f"{kind}.{key}"], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_what_is_moved_is_everything_that_the_optimizer_keeps(moved):
    name, way = CASES[0]
    end = moved[f"{name}/{way}"]["end"]
    assert end["optimizer.inner.weight.exp_avg_sq"].shape == (16, 12)
    assert float(end["optimizer.inner.weight.step"]) == end["steps"]
    assert "optimizer.unused.weight.step" not in end
    assert end["group.0.betas"] == (0.9, 0.999)
    assert end["group.1.weight_decay"] == 0.0
