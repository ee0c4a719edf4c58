"""`--replan`: a run changes its layout while it trains, and trains the same as without."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import slowed
import torch
from command import of_kind, paceline, read_events
from safetensors.torch import load_file
from torch.distributed import TCPStore

from paceline.comm.beacon import Beacon
from paceline.comm.world import World
from paceline.errors import CollectiveError
from paceline.load import load_job_file
from paceline.report.reader import read_log
from paceline.train.session import Session

HERE = Path(__file__).parent
SLOWED = HERE.parent / "slowed.py"
STEPS = 130


def alone(steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and weights of the same training in one process, which nothing slows down."""
    job = load_job_file(str(SLOWED), {"sample_s": "0"}).job
    session = Session(job, "dp_replicate=1", seed=3, total_steps=steps)
    losses = [session.step(batch).loss for batch in session.batches(steps=steps)]
    return torch.tensor(losses), session.model.state_dict()


def check_as_alone(directory: Path, steps: int) -> list[dict[str, Any]]:
    """That a run has made these steps, with the losses and weights of one process; its events."""
    events = read_events(directory)
    found, (losses, weights) = of_kind(events, "step"), alone(steps)
    assert [event["step"] for event in found] == list(range(1, steps + 1))
    torch.testing.assert_close(torch.tensor([e["loss"] for e in found]), losses, rtol=1e-4, atol=1e-5)
    for name, value in load_file(directory / "weights.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)
    assert events[-1]["status"] == "finished"
    assert events[-1]["metrics"]["weight"] == pytest.approx(float(weights["inner.weight"].sum()), abs=1e-3)
    return events


def test_a_run_leaves_a_worker_that_got_slow_and_comes_back_to_it(tmp_path):
    """dp_replicate=2 → one process, when worker 1 gets slow → dp_replicate=2, when worker 0 does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*command, str(HERE / "replan_worker.py"), str(tmp_path), str(STEPS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    events = check_as_alone(tmp_path / "rank0", STEPS)
    changes = [event for event in of_kind(events, "replan") if event["changed"]]
    workers = [(event["from"]["dp_replicate"], event["to"]["dp_replicate"]) for event in changes]
    assert workers[:2] == [(2, 1), (1, 2)], of_kind(events, "replan")
    for before, after in itertools.pairwise(changes):
        assert before["step"] < after["step"]
    assert changes[0]["change_s"] >= changes[0]["trial_s"] + changes[0]["move_s"] > 0
    plans = of_kind(events, "plan")
    assert [plan["layout"] for plan in plans[1:]] == [change["to"] for change in changes]
    (ranks,) = of_kind(events, "ranks")
    assert len(ranks["ranks"]) == plans[-1]["layout"]["dp_replicate"]
    assert ranks["ranks"][0]["steps"] == STEPS - changes[-1]["step"]
    log = read_log(tmp_path / "rank0" / "events.jsonl")
    assert len(log.trials) == len(changes[-1]["trials"])


def test_the_command_takes_another_layout_and_says_so(tmp_path):
    """As a user starts it, with its real patience; worker 1 gets slow some time after the first steps."""
    out, slower = tmp_path / "run", tmp_path / "slower"

    def wait_and_slow_down() -> None:
        for _ in range(600):
            time.sleep(0.2)
            events = out / "events.jsonl"
            if events.exists() and events.read_text().count('"event": "step"') > 20:
                slowed.slow_down(slower, "1 6")
                return

    thread = threading.Thread(target=wait_and_slow_down)
    thread.start()
    process = paceline(
        "train", str(SLOWED), "--replan", f"--out={out}", "--seed=3", "--steps=360", "--precision=fp32",
        f"--set=slower={slower}", "--set=sample_s=0.002", timeout_s=250,
    )  # fmt: skip
    thread.join()
    assert process.returncode == 0, process.stdout + process.stderr
    events = check_as_alone(out, 360)
    told = of_kind(events, "replan")
    if of_kind(events, "plan")[0]["layout"]["dp_replicate"] == 1:
        pytest.skip("this machine is so busy that two workers were not faster, even before")
    assert told[0]["changed"], told
    assert told[0]["to"]["dp_replicate"] == 1
    assert f"Step {told[0]['step']}: " in process.stdout
    assert "The layout reconsidered" in (out / "report.html").read_text()


def test_a_layout_that_is_asked_for_is_kept(tmp_path):
    process = paceline("train", str(SLOWED), "--replan", "--layout=dp_replicate=2", f"--out={tmp_path / 'run'}")
    assert process.returncode == 1
    assert "--replan is given with --layout dp_replicate=2" in process.stderr


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    return store


def world(rank: int, timeout_s: float) -> World:
    return World(rank, 2, rank, 2, torch.device("cpu"), timeout_s)


def test_who_waits_waits_as_long_as_rank_0_lives(store):
    first, second = Beacon(world(0, 0.5)), Beacon(world(1, 0.5))
    threading.Timer(1.5, first.call, ["reconsider"]).start()
    assert second.wait() == "reconsider"
    first.call("skipped")
    second.skip()
    first.call("end")
    assert second.wait() == "end"
    first.close()
    with pytest.raises(CollectiveError, match="rank 1: waiting to be called to train failed") as error:
        second.wait()
    assert error.value.timed_out
    assert "rank 0 was silent for 0 s" in str(error.value)
