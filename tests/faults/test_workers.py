"""Workers that raise, die or fall silent: a plain error that names the rank, never a hang, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ENVIRONMENT, TOY, of_kind, paceline, read_events, workers_alive


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("raise", "rank 1 raised ValueError: a planted error (toy.py, line "),
        ("kill", "rank 1 was killed by SIGKILL"),
        ("exit", "rank 1 ended with exit status 3 and no word of why"),
        ("bad_sample", "reading the training data failed: OSError: the disk is gone"),
        ("drift", "the parameters of rank 1 differ from rank 0's, first in inner.weight"),
    ],
)
def test_a_worker_that_fails_is_named(mode, words, tmp_path):
    process = paceline(
        "train", str(TOY), "--layout=dp_replicate=2", f"--set=mode={mode}", f"--out={tmp_path}"
    )
    assert process.returncode == 1
    assert words in process.stderr
    assert "Next step:" in process.stderr
    assert "Traceback" not in process.stderr
    assert not workers_alive(tmp_path)
    end = read_events(tmp_path)[-1]
    assert end["event"] == "end"
    assert end["status"] == "failed"
    assert words in end["error"]


def test_a_worker_that_falls_silent_is_named_when_the_time_is_up(tmp_path, default_transport):
    begin_s = time.monotonic()
    process = paceline(
        "train", str(TOY), "--layout=dp_replicate=2", "--set=mode=stop", "--timeout=4", f"--out={tmp_path}"
    )
    assert process.returncode == 1
    assert (
        "rank 0: all-reduce of gradients" in process.stderr
        or "rank 0: all-gather of batch-norm" in process.stderr
    )
    assert "rank 1 did not answer within 4 s" in process.stderr
    if default_transport == "shared memory":
        assert "is stopped" in process.stderr
    assert "; silent: rank 1" in process.stderr
    assert not workers_alive(tmp_path)
    assert time.monotonic() - begin_s < 110


def wait_for_training(directory: Path, process: subprocess.Popen) -> None:
    events = directory / "events.jsonl"
    deadline_s = time.monotonic() + 90
    while not (events.exists() and '"event": "evaluation"' in events.read_text()):
        assert time.monotonic() < deadline_s, "the training did not begin"
        assert process.poll() is None
        time.sleep(0.1)


def start_long_run(directory: Path) -> subprocess.Popen:
    """A run that does not end by itself; returns when it trains."""
    arguments = ["--layout=dp_replicate=2", "--steps=100000", "--set=step_s=0.01", f"--out={directory}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "train", str(TOY), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for_training(directory, process)
    return process


def test_an_interrupted_run_keeps_its_weights(tmp_path):
    process = start_long_run(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 130, error
    end = read_events(tmp_path)[-1]
    assert end["status"] == "interrupted"
    assert end["steps"] == len(of_kind(read_events(tmp_path), "step"))
    assert (tmp_path / end["weights"]).is_file()
    assert not workers_alive(tmp_path)


def test_workers_end_when_the_launcher_is_killed(tmp_path):
    process = start_long_run(tmp_path)
    assert len(workers_alive(tmp_path)) == 2
    process.kill()
    process.wait(timeout=30)
    deadline_s = time.monotonic() + 30
    while workers_alive(tmp_path):
        assert time.monotonic() < deadline_s, "workers train on without their launcher"
        time.sleep(0.1)


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "events.jsonl").write_text("{}\n")
    process = paceline("train", str(TOY), f"--out={tmp_path}")
    assert process.returncode == 1
    assert "already holds a run" in process.stderr
    assert (tmp_path / "events.jsonl").read_text() == "{}\n"


def test_a_port_in_use_is_said_before_workers_start(tmp_path):
    from paceline.comm.world import listen_on_loopback

    with listen_on_loopback(0) as taken:
        port = taken.getsockname()[1]
        process = paceline("train", str(TOY), f"--port={port}", f"--out={tmp_path}")
    assert process.returncode == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in process.stderr
    assert not (tmp_path / "logs").exists()


def test_no_directory_to_write_to():
    process = paceline("train", str(TOY), "--out=/proc/nowhere")
    assert process.returncode == 1
    assert "the run's directory /proc/nowhere cannot be made" in process.stderr
    assert Path("/proc").is_dir()
